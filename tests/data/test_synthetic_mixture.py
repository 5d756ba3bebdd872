import hashlib
import random
from collections import Counter
from itertools import pairwise

import pytest

from kvc.data.synthetic.base import document_text, rng_for, split_of
from kvc.data.synthetic.curriculum import SCHEDULE, TASKS, Mixture, row_at
from kvc.data.synthetic.helpers import drill, equation, lookup, repeat
from kvc.data.synthetic.passages import OBJECT, PEOPLE, sample_passage

HEADS = {"Repeat": "repeat", "List": "lookup", "Passage": "passages", "Drill": "drill", "Question": "reasoning"}


def task_of(document):
    return HEADS[document[0].text.split(":")[0]]


def test_every_answer_is_in_its_passage():
    for seed in range(200):
        passage = sample_passage(random.Random(seed))
        facts = passage.text.split(". ")
        assert 4 <= len(facts) <= 30
        assert 1 <= len(passage.questions) <= 4
        for question, answer in passage.questions:
            assert f" {answer}" in passage.text
            assert question.endswith("?")


def test_the_right_type_is_not_enough():
    # Values of the kind that is asked for, in passages of 12 to 20 facts: a guess by type would be wrong mostly.
    candidates = []
    for seed in range(200):
        passage = sample_passage(random.Random(seed), (12, 20), (1, 1))
        kind = next(r.values for r in (*PEOPLE, *OBJECT) if passage.questions[0].answer in r.values)
        candidates.append(sum(word.strip(".") in kind for word in passage.text.split()))
    assert sum(candidates) / len(candidates) > 6
    assert sum(count == 1 for count in candidates) < 10


def test_lookup_answers_agree_with_the_list():
    for seed in range(100):
        document = lookup(random.Random(seed))
        pairs = document[0].text.removeprefix("List:")
        asked = [(a.text, b.text) for a, b in pairwise(document) if b.kind == "answer"]
        assert asked
        assert all(f"{key}{value};" in pairs for key, value in asked)


def test_repeat_repeats():
    for seed in range(50):
        head, *again = repeat(random.Random(seed))
        assert again
        assert all(f"Repeat:{segment.text}" == head.text for segment in again)


def test_equations_are_right_and_within_two_digits():
    for seed in range(2000):
        left, result = equation(random.Random(seed))
        a, sign, b, _ = left.split()
        assert {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b), "/": int(a) / int(b)}[sign] == result
        assert 1 <= result <= 99
    assert drill(random.Random(0))[2].kind == "result"


def test_schedule_is_interpolated():
    assert row_at(0.0).weights == SCHEDULE[0].weights
    assert row_at(1.0).weights == SCHEDULE[-1].weights
    assert row_at(-1) == row_at(0)
    assert row_at(2) == row_at(1)
    low, high = SCHEDULE[5], SCHEDULE[6]
    middle = row_at((low.progress + high.progress) / 2)
    assert middle.facts == pytest.approx((low.facts + high.facts) / 2)
    assert middle.weights[2] == pytest.approx((low.weights[2] + high.weights[2]) / 2)


def test_schedule_starts_with_recall_and_ends_with_reasoning():
    mixture = Mixture()
    seen = {
        p: Counter(task_of(mixture.document(rng_for("t", "train", 0, i), p)) for i in range(400)) for p in (0, 0.1, 1)
    }
    assert set(seen[0]) == {"repeat"}
    assert set(seen[0.1]) == {"repeat", "lookup", "passages"}
    assert seen[1]["reasoning"] > 0.5 * 400
    assert set(HEADS.values()) == set(TASKS)


def test_mixture_uses_the_train_split_only():
    mixture = Mixture()
    owned = 0
    for index in range(300):
        document = mixture.document(rng_for("t", "train", 1, index), 0.9)
        head = document[0].text
        if head.startswith("Question: "):
            owned += split_of(head.removeprefix("Question: ").removesuffix("\nSolution:\n")) == "train"
        elif head.startswith("Passage: "):
            owned += split_of(head.removeprefix("Passage: ")) == "train"
        else:
            owned += 1
    assert owned == 300


def test_mixture_is_pinned():
    mixture = Mixture()
    text = "\n\n".join(document_text(mixture.document(rng_for("pin", "train", 42, i), i / 100)) for i in range(100))
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "acfd2752d427eb53"
