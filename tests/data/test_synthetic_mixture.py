import hashlib
import random
from collections import Counter
from itertools import pairwise

import pytest

from kvc.data.synthetic.base import document_text, rng_for, split_of
from kvc.data.synthetic.curriculum import CHAT, FAMILIES, HELPERS, SCHEDULE, Mixture, row_at
from kvc.data.synthetic.example import EOS
from kvc.data.synthetic.helpers import drill, equation, lookup, repeat, sort
from kvc.data.synthetic.passages import OBJECT, PEOPLE, sample_passage
from kvc.data.synthetic.vocabulary import TOPICS

HEADS = {
    "Repeat:": "repeat",
    "List:": "lookup",
    "Passage:": "passages",
    "Drill:": "drill",
    "Sort:": "sort",
    "Question:": "reasoning",
    "Input:": "in_context",
    "History of": "personalisation",
    "Document 1": "study",
    "Section 1": "documents",
    "User:": "conversation",
}


def task_of(document):
    text = document_text(document)
    known = [task for head, task in HEADS.items() if text.startswith(head)]
    return known[0] if known else "system" if "User: " in text else "dialogue"


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


def test_sorted_words_have_the_label_of_their_kind():
    for seed in range(100):
        labels = {}
        for before, label in pairwise(sort(random.Random(seed))):
            if label.text != ";" and before.text.endswith(":") and before.text != "Sort:":
                kind = next(i for i, words in enumerate(TOPICS) if before.text.strip(" :") in words)
                assert (label.kind == "answer") == (kind in labels)
                assert labels.setdefault(kind, label.text) == label.text
        assert 1 <= len(labels) <= 6


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
    assert row_at(0.0).families == SCHEDULE[0].families
    assert row_at(1.0).families == SCHEDULE[-1].families
    assert row_at(-1) == row_at(0)
    assert row_at(2) == row_at(1)
    low, high = SCHEDULE[5], SCHEDULE[6]
    middle = row_at((low.progress + high.progress) / 2)
    assert middle.facts == pytest.approx((low.facts + high.facts) / 2)
    assert middle.families[1] == pytest.approx((low.families[1] + high.families[1]) / 2)
    assert middle.helpers[2] == pytest.approx((low.helpers[2] + high.helpers[2]) / 2)
    assert middle.tokens == pytest.approx((low.tokens + high.tokens) / 2)


def test_schedule_starts_with_recall_and_ends_with_reasoning():
    mixture = Mixture()
    seen = {
        p: Counter(task_of(mixture.document(rng_for("t", "train", 0, i), p)) for i in range(400))
        for p in (0, 0.06, 0.3, 1)
    }
    assert set(seen[0]) == {"repeat"}
    assert set(seen[0.06]) == {"repeat", "lookup", "passages", "conversation"}
    assert seen[1]["reasoning"] > 0.35 * 400
    assert {*HELPERS, *FAMILIES} - {"repeat"} <= set(seen[0.3])


def test_a_share_is_laid_out_as_conversations():
    documents = [Mixture().document(rng_for("t", "train", 2, i), 0.9) for i in range(600)]
    texts = [document_text(document) for document in documents]
    talks = [text for text in texts if "User: " in text]
    assert abs(len(talks) / len(texts) - CHAT) < 0.05
    assert all(text.endswith(f"{EOS}\n") for text in talks)
    assert sum("<think>" in text for text in talks) > 20


def test_mixture_uses_the_train_split_only():
    owned = 0
    for index in range(300):
        document = Mixture().document(rng_for("t", "train", 1, index), 0.9)
        text = document_text(document)
        if text.startswith("Question: "):
            statements = text.removeprefix("Question: ").split(" How many ")[0]
            owned += split_of(statements) == "train"
        elif text.startswith("Passage: "):
            owned += split_of(text.removeprefix("Passage: ").split("\nQuestion: ")[0]) == "train"
        else:
            owned += 1
    assert owned == 300


def test_mixture_is_pinned():
    mixture = Mixture()
    text = "\n\n".join(document_text(mixture.document(rng_for("pin", "train", 42, i), i / 100)) for i in range(100))
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "4bb13f69550d7173"
