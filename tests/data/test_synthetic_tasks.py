import hashlib
import json
import re
from itertools import pairwise
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from kvc.data.prompts import SYSTEM
from kvc.data.synthetic.base import document_text, split_of
from kvc.data.synthetic.dialogue import TRAITS
from kvc.data.synthetic.documents import count_tokens, sample_document
from kvc.data.synthetic.example import chat, plain
from kvc.data.synthetic.in_context import sample_in_context
from kvc.data.synthetic.passages import OBJECT, PEOPLE, UNKNOWN
from kvc.data.synthetic.personalisation import sample_history
from kvc.data.synthetic.samples import sample_lines
from kvc.data.synthetic.study import study_chat
from kvc.data.synthetic.tasks import TASKS, example
from kvc.data.synthetic.vocabulary import TOPICS

ROOT = Path(__file__).parents[2]
LEVELS = [(task.name, level.name) for task in TASKS.values() for level in task.levels]


def items(task, level, count=100, split="test", seed=3):
    return [example(task, split, seed, index, level) for index in range(count)]


def kind_of(word):
    return next(number for number, kind in enumerate(TOPICS) if word in kind)


def asked(query):
    """Relation and entity of a question."""
    question = query.strip().removeprefix("Question: ")
    return next(
        (relation, match[1])
        for relation in (*PEOPLE, *OBJECT)
        for form in relation.questions
        if (match := re.fullmatch(re.escape(form).replace(r"\{e\}", r"(\w+)"), question))
    )


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ROOT / "data/tiny-lm")


def test_generation_is_pinned():
    text = "\n\n".join(
        document_text(plain(item)) for task, level in LEVELS for item in items(task, level, 5, "val", 42)
    )
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "97c425f9daa2b902"


@pytest.mark.parametrize(("task", "level"), LEVELS)
def test_the_same_keys_give_the_same_item_and_other_keys_another(task, level):
    reference = example(task, "train", 1, 1, level)
    assert reference == example(task, "train", 1, 1, level)
    others = [
        example(task, "test", 1, 1, level),
        example(task, "train", 2, 1, level),
        example(task, "train", 1, 2, level),
    ]
    assert all(other != reference for other in others)


@pytest.mark.parametrize(("task", "level"), LEVELS)
def test_no_context_is_in_two_splits(task, level):
    if task == "documents":
        return  # below: long items, slow to draw by the hundred
    contexts = {split: {item.material for item in items(task, level, 150, split)} for split in ("train", "test")}
    assert not contexts["train"] & contexts["test"]


def test_the_context_owns_the_split():
    for task, level in LEVELS:
        for item in items(task, level, 3, "val"):
            assert split_of(item.material) == "val"


@pytest.mark.parametrize(("task", "level"), LEVELS)
def test_the_plain_layout_is_prompt_then_answer_and_the_gold_answer_is_right(task, level):
    grade = TASKS[task].grade
    for item in items(task, level, 20):
        (turn,) = item.turns
        answer = document_text(list(turn.answer))
        assert document_text(plain(item)) == item.prompt + answer
        assert item.prompt == item.context + turn.query + turn.lead
        if grade is None:
            continue
        assert grade(answer, item)
        assert grade(answer + "\nmore text", item) or task == "reasoning"
        assert not grade("", item)
        assert not grade("something else", item)


@pytest.mark.parametrize(("task", "low", "high"), [("reasoning", 2, 16), ("in_context", 1, 16), ("dialogue", 2, 12)])
def test_sizes_span_the_levels(task, low, high):
    sizes = []
    for level in TASKS[task].levels:
        for item in items(task, level.name, 60):
            size = len(item.steps) if task == "reasoning" else len(item.chunks)
            assert level.size[0] <= size <= level.size[1]
            sizes.append(size)
    assert (min(sizes), max(sizes)) == (low, high)


def test_unknown_levels_are_named():
    with pytest.raises(KeyError, match="2-4, 5-8, 9-16"):
        example("reasoning", "test", 1, 1, "99")


# What each task promises.


@pytest.mark.parametrize("level", ["4-8", "9-16", "17-30"])
def test_a_passage_answers_its_question_in_one_sentence(level):
    for item in items("passages", level):
        sentences = [document_text(list(chunk)).strip() for chunk in item.chunks]
        assert int(level.split("-")[0]) <= len(sentences) <= int(level.split("-")[1])
        relation, entity = asked(item.turns[0].query)
        told = [form.format(e=entity, v=item.gold) for form in relation.statements]
        assert sum(sentence in told for sentence in sentences) == 1


def test_an_unanswerable_question_has_no_sentence():
    for item in items("passages", "unanswerable", 300):
        assert item.gold == UNKNOWN
        relation, entity = asked(item.turns[0].query)
        told = [f.format(e=entity, v=value) for f in relation.statements for value in relation.values]
        assert not any(statement in item.material for statement in told)


def test_in_context_labels_follow_the_kind_of_the_word():
    for item in items("in_context", "16", 200):
        pairs = re.findall(r"Input: (\w+)\nOutput: (\w+)", item.context + "\n")
        pairs.append((re.search(r"Input: (\w+)$", item.turns[0].query)[1], item.gold))
        labels = {}
        for word, label in pairs:
            assert labels.setdefault(kind_of(word), label) == label
        assert len({word for word, _ in pairs}) == 17
        assert set(labels.values()) <= set(item.choices)
        assert len(item.choices) == 4


def test_demonstrations_are_answers_once_their_kind_is_known():
    import random

    item = sample_in_context(random.Random(0), (16, 16))
    seen = set()
    for before, label, _ in item.chunks:
        kind = kind_of(re.search(r"Input: (\w+)", before.text)[1])
        assert (label.kind == "answer") == (kind in seen)
        seen.add(kind)


def test_a_user_tags_by_kind_and_the_history_shows_the_kind():
    for level in ("4-8", "9-16", "17-32"):
        for item in items("personalisation", level):
            history = re.findall(r"The note on (\w+) is (\w+)\.", item.context)
            tags = {}
            for word, tag in history:
                assert tags.setdefault(kind_of(word), tag) == tag
            word = re.fullmatch(r"The note on (\w+) is", item.turns[0].query)[1]
            assert word not in dict(history)
            assert tags[kind_of(word)] == item.gold


def test_users_differ_from_the_common_tag():
    import random

    tags = [sample_history(random.Random(seed)) for seed in range(300)]
    word = [re.search(r"on (\w+) is", item.turns[0].query)[1] for item in tags]
    common = {}
    for name, item in zip(word, tags):
        common.setdefault(kind_of(name), []).append(item.gold)
    shares = [max(golds.count(tag) for tag in golds) / len(golds) for golds in common.values()]
    assert all(0.2 < share < 0.65 for share in shares)


def test_dialogue_refers_back_to_what_was_told():
    for level in ("2-4", "5-8", "9-12"):
        for item in items("dialogue", level):
            speaker = item.turns[0].query.removesuffix(":")
            lines = [document_text(list(chunk)) for chunk in item.chunks]
            text = item.gold.replace("You told", "you told", 1)
            facts = re.findall(r"(you|I) told (?:you|me) that ((?:\w+ )+)(\w+)", text)
            assert facts
            for who, claim, value in facts:
                mine = who == "I"
                trait = next(t for t in TRAITS if (t.me if mine else t.you) == claim.strip())
                told = [line for line in lines if f"{trait.me[1:]} {value}" in line]
                assert any(line.startswith(speaker) == mine for line in told)


def test_documents_remind_of_facts_of_earlier_sections():
    for item in items("documents", "512-1024", 40):
        known = ""
        for chunk in item.chunks:
            for before, value in pairwise(chunk):
                if value.kind == "answer":
                    claim = before.text.removeprefix(" Remember that ")
                    assert f"{claim[1:]}{value.text}" in known
            known += document_text(list(chunk))
        claim = item.turns[0].query.removeprefix(" Remember that ")
        assert f"{claim[1:]} {item.gold}" in item.material


@pytest.mark.parametrize("level", TASKS["documents"].levels)
def test_document_lengths(level, tokenizer):
    for item in items("documents", level.name, 4):
        text = document_text(plain(item))
        tokens = len(tokenizer(text)["input_ids"])
        assert count_tokens(text) == tokens
        assert 0.8 * level.size[0] <= tokens <= level.size[1] + 90
        assert tokens + 2 <= 4096


def test_information_is_spread_unevenly():
    import random

    item = sample_document(random.Random(1), (3000, 3000))
    reminders = [sum(segment.kind == "answer" for segment in chunk) for chunk in item.chunks]
    assert max(reminders) >= 5
    assert reminders.count(0) >= len(reminders) // 3


def test_study_questions_belong_to_one_document():
    for item in items("study", "4-6", 100):
        documents = [document_text(list(chunk)) for chunk in item.chunks]
        assert [d.split(":")[0] for d in documents] == [f"Document {i + 1}" for i in range(len(documents))]
        relation, entity = asked(item.turns[0].query)
        statements = [form.format(e=entity, v=item.gold) for form in relation.statements]
        assert sum(any(s in d for s in statements) for d in documents) == 1


@pytest.mark.parametrize(
    ("task", "level"),
    [*(("reasoning", level.name) for level in TASKS["reasoning"].levels), ("passages", "9-16"), ("passages", "17-30")]
    + [("in_context", level.name) for level in TASKS["in_context"].levels],
)
def test_shortcuts_stay_below_30_percent(task, level):
    right = [item.shortcut == item.gold for item in items(task, level, 500, seed=42)]
    assert sum(right) / len(right) < 0.3


# What is needed, and for how long.


def test_every_operand_is_alive_when_it_is_used():
    for item in items("reasoning", "9-16", 60):
        text = document_text(plain(item))
        for match in re.finditer(r"(\d+) [-+*/] (\d+) = \d+", text):
            alive = [text[life.start : life.end] for life in item.lifetimes if life.end <= match.start() < life.until]
            numbers = {number for piece in alive for number in re.findall(r"\d+", piece)}
            assert match[1] in numbers
    assert all(life.start < life.end <= life.until for life in item.lifetimes)


def test_a_replaced_number_is_no_longer_needed():
    item = next(item for item in items("reasoning", "9-16") if re.search(r"finds|buys", item.context))
    text = document_text(plain(item))
    end = len(text)
    assert any(life.until < end for life in item.lifetimes if life.start > len(item.prompt))
    assert [text[:stop].rsplit(" ", 1)[1] for stop in item.steps] == [text[:s].split()[-1] for s in item.steps]
    assert len(item.steps) == text.count(" = ")


# Conversations.


def messages_text(tokenizer, messages, **options):
    return tokenizer.apply_chat_template(messages, tokenize=False, **options)


@pytest.mark.parametrize("task", ["passages", "in_context", "dialogue", "personalisation", "documents"])
def test_a_conversation_is_what_the_template_writes(task, tokenizer):
    item = example(task, "train", 0, 0, TASKS[task].levels[0].name)
    turn = item.turns[0]
    answer = turn.lead.lstrip("\n") + document_text(list(turn.answer))
    messages = [{"role": "user", "content": item.material + turn.query}, {"role": "assistant", "content": answer}]
    assert document_text(chat(item)) == messages_text(tokenizer, messages)


def test_reasoning_can_think_first(tokenizer):
    item = example("reasoning", "train", 0, 0, "2-4")
    solution, last = document_text(list(item.turns[0].answer)).rsplit("\n", 1)
    messages = [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": item.material + item.turns[0].query},
        {"role": "assistant", "content": f"<think>\n{solution}\n</think>\n{last}"},
    ]
    text = document_text(chat(item, thinking=True, system=SYSTEM))
    assert text == messages_text(tokenizer, messages)
    prompt = messages_text(tokenizer, messages[:2], add_generation_prompt=True, enable_thinking=True)
    assert text.startswith(prompt)
    assert prompt.endswith("Assistant:\n<think>\n")


def test_study_is_read_while_thinking(tokenizer):
    item = example("study", "train", 0, 0, "2-3")
    text = document_text(study_chat(item))
    read, asked = text.split("</think>")
    assert item.material in read
    assert item.turns[0].query in asked
    assert asked.endswith(f"Answer: {item.gold}<|eos|>\n")


# Files.


@pytest.mark.parametrize("task", TASKS)
def test_sample_files_are_what_the_code_writes(task):
    path = ROOT / "data/samples" / f"{task}.jsonl"
    assert path.read_text() == sample_lines(task)
    for line in path.read_text().splitlines():
        record = json.loads(line)
        assert {"task", "level", "context", "query", "lead", "answer"} <= set(record)
