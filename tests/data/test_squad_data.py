"""SQuAD as batches: parts, windows, splits and what evaluations may not know."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoTokenizer

from kvc.core.backbone import tiny_folder
from kvc.data.squad import Squad
from kvc.data.squad.encoding import encode
from kvc.data.squad.example import SquadExample
from kvc.data.squad.passages import ENTITIES, synthetic_squad
from kvc.data.squad.template import CHAT, PLAIN, SEED, SquadTemplate, render
from kvc.errors import UserError


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(tiny_folder())


def made(tokenizer: Any, **settings: Any) -> Squad:
    data = Squad(**{"counts": (24, 6, 6), "batch_size": 4, **settings})
    data.tokenizer = tokenizer
    return data


def batches(data: Squad, split: Any, epoch: int = 0) -> list[dict[str, Any]]:
    dataset, collate = data.dataset(split), data.collate(split)
    items = [dataset[(epoch, number)] for number in range(len(dataset))]
    return [collate(items[first : first + 4]) for first in range(0, len(items), 4)]


def texts(batch: dict[str, Any], part: str, tokenizer: Any) -> list[str]:
    rows = zip(batch[f"{part}_ids"], batch[f"{part}_mask"])
    return [tokenizer.decode(ids[mask]) for ids, mask in rows]


def official(tmp_path: Path, contexts: list[str], name: str = "squad.json", asked: int = 2) -> str:
    """Questions for the last word of each context."""
    paragraphs = []
    for number, context in enumerate(contexts):
        word = context.rstrip(".").split()[-1]
        answers = [{"text": word, "answer_start": context.rindex(word)}]
        qas = [{"id": f"{name}{number}-{i}", "question": f"Which {i}?", "answers": answers} for i in range(asked)]
        paragraphs.append({"context": context, "qas": qas})
    path = tmp_path / name
    path.write_text(json.dumps({"version": "1.1", "data": [{"title": "t", "paragraphs": paragraphs}]}))
    return str(path)


def long_context(number: int) -> str:
    return (
        f"{'The lamp is in the hall. ' * 20}Karl number {number} lives in Rome. {'The map is gold. ' * 20}End{number}."
    )


@pytest.mark.parametrize(("context", "answer"), [("She left (Rome) soon.", "Rome"), ("It was -7- or 8.", "7")])
def test_a_span_ends_where_the_answer_does(context: str, answer: str, tokenizer: Any) -> None:
    """Characters beside the answer, without a blank between, stay outside."""
    example = SquadExample("q", context, "Which?", (answer,), (context.index(answer),))
    (encoded,) = encode([example], tokenizer, PLAIN, "unknown")
    ((first, last),) = encoded.spans
    assert tokenizer.decode(encoded.context[first:last]).strip() == answer


@pytest.mark.parametrize("template", ["plain", "seed", "chat"])
def test_parts_are_the_prompt(tokenizer: Any, template: Any) -> None:
    data = made(tokenizer, template=template)
    for batch in batches(data, "train"):
        parts = {part: texts(batch, part, tokenizer) for part in ("head", "context", "tail", "answer")}
        for row, question in enumerate(batch["questions"]):
            head, tail = parts["head"][row].removeprefix("<|bos|>"), parts["tail"][row]
            assert head + parts["context"][row] + tail == question.prompt
            assert parts["context"][row] == f" {question.example.context}"
            blank = "" if template == "chat" else " "
            assert parts["answer"][row] == f"{blank}{question.gold}{tokenizer.eos_token}"
            first, last = batch["span"][row].tolist()
            assert tokenizer.decode(batch["context_ids"][row, first:last]) == f" {question.gold}"
        assert (batch["head_ids"][:, 0] == tokenizer.bos_token_id).all() == (template != "chat")
    example = question.example
    prompts = {
        "plain": f"Passage: {example.context}\nQuestion: {example.question}\nAnswer:",
        "seed": f"Question: {example.question}\nContext: {example.context}\nAnswer:",
    }
    if template in prompts:
        assert question.prompt == prompts[template]
        assert tokenizer(question.prompt)["input_ids"] == [
            *batch["head_ids"][row][batch["head_mask"][row]].tolist()[1:],
            *batch["context_ids"][row][batch["context_mask"][row]].tolist(),
            *batch["tail_ids"][row][batch["tail_mask"][row]].tolist(),
        ]


def test_templates() -> None:
    plain = render(PLAIN, "Who?")
    assert plain == ("Passage:", "\nQuestion: Who?\nAnswer:", "Question: Who?\nAnswer:")
    assert plain.prompt("It is.") == "Passage: It is.\nQuestion: Who?\nAnswer:"
    assert render(SEED, "Who?") == ("Question: Who?\nContext:", "\nAnswer:", "Question: Who?\nAnswer:")
    braces = SquadTemplate(instruction='Answer in {"a": 1}.\n')
    assert render(braces, "Who {x}?").head == 'Answer in {"a": 1}.\nPassage:'
    assert render(braces, "Who {x}?").tail == "\nQuestion: Who {x}?\nAnswer:"
    with pytest.raises(UserError, match="'chat' needs a tokenizer with a chat template"):
        render(CHAT, "Who?", SimpleNamespace(chat_template=None))
    with pytest.raises(UserError, match=r"data.template.question must hold \{question\}"):
        SquadTemplate(question="?")


def test_the_whole_prompt_as_what_is_compressed(tokenizer: Any) -> None:
    apart, whole = made(tokenizer), made(tokenizer, scope="prompt")
    for first, second in zip(batches(apart, "train"), batches(whole, "train")):
        assert second["head_ids"].tolist() == [[tokenizer.bos_token_id]] * len(second["id"])
        assert not second["tail_mask"].any()
        assert texts(second, "context", tokenizer) == [question.prompt for question in first["questions"]]
        for row, question in enumerate(second["questions"]):
            start, stop = second["span"][row].tolist()
            assert tokenizer.decode(second["context_ids"][row, start:stop]) == f" {question.gold}"


def test_training_windows_hold_the_answer_and_move(tokenizer: Any, tmp_path: Path) -> None:
    data = made(
        tokenizer, path=official(tmp_path, [long_context(i) for i in range(10)]), counts=None, context_length=64
    )
    epochs = [batches(data, "train", epoch) for epoch in (0, 0, 1)]
    for batch in epochs[0]:
        assert (batch["context_mask"].sum(-1) == 64).all()
        for row, question in enumerate(batch["questions"]):
            first, last = batch["span"][row].tolist()
            assert tokenizer.decode(batch["context_ids"][row, first:last]).strip(" .") == question.gold
    assert all((a["context_ids"] == b["context_ids"]).all() for a, b in zip(epochs[0], epochs[1]))
    # The answer is at the end of its context, so a window can only end there; one in the middle moves.
    middle = [f"{'a b c d e ' * 30}Rome {'f g h i j ' * 30}".strip() for _ in range(1)]
    document = json.loads(Path(official(tmp_path, middle, "middle.json", 1)).read_text())
    paragraph = document["data"][0]["paragraphs"][0]
    paragraph["qas"][0]["answers"] = [{"text": "Rome", "answer_start": paragraph["context"].index("Rome")}]
    (tmp_path / "middle.json").write_text(json.dumps(document))
    moving = made(tokenizer, path=str(tmp_path / "middle.json"), counts=None, split=(1.0, 0.0, 0.0), context_length=16)
    starts = set()
    for epoch in range(40):
        (batch,) = batches(moving, "train", epoch)
        first, last = batch["span"][0].tolist()
        assert tokenizer.decode(batch["context_ids"][0, first:last]).strip() == "Rome"
        starts.add(first)
    assert min(starts) == 0
    assert max(starts) >= 12


def test_evaluations_never_use_the_place_of_the_answer(tokenizer: Any, tmp_path: Path) -> None:
    path = official(tmp_path, [long_context(i) for i in range(10)])
    whole, cut = (
        made(tokenizer, path=path, counts=None, context_length=64, long_eval=how) for how in ("chunks", "truncate")
    )
    for split in ("val", "test"):
        for first, second in zip(batches(whole, split), batches(cut, split)):
            assert (first["span"] == -1).all()
            assert (second["span"] == -1).all()
            assert (first["context_mask"].sum(-1) > 200).all()
            assert (second["context_ids"] == first["context_ids"][:, :64]).all()
    assert cut.answer_lost("test") == 1
    assert cut.describe()["answer_lost"] == {"val": 1.0, "test": 1.0}
    assert whole.answer_lost("test") == 0
    short = made(tokenizer, path=path, counts=None, context_length=2000, long_eval="truncate")
    assert short.answer_lost("test") == 0


def test_training_questions_that_do_not_fit_are_counted(tokenizer: Any, tmp_path: Path) -> None:
    contexts = [*(f"It is in Rome{i}." for i in range(6)), f"It is {'x' * 200}.", f"It is {'ab' * 8}."]
    path = official(tmp_path, contexts, asked=1)
    data = made(tokenizer, path=path, counts=None, split=(1.0, 0.0, 0.0), context_length=8, max_answer=30)
    assert len(data.rows("train")) + sum(data.dropped.values()) == 8
    assert data.dropped == {"answer_too_long": 1, "span_too_long": 1}
    assert data.describe()["dropped"] == data.dropped
    nothing = made(tokenizer, path=path, counts=None, max_answer=1)
    with pytest.raises(UserError, match=r"leaves no training question \(dropped: \{'answer_too_long'"):
        nothing.rows("train")


def test_questions_about_one_context_stay_together(tokenizer: Any, tmp_path: Path) -> None:
    path = official(tmp_path, [f"It is in place{i}." for i in range(20)], asked=3)
    data = made(tokenizer, path=path, counts=None)
    contexts = {name: {example.context for example in part} for name, part in data.examples.items()}
    assert [len(contexts[name]) for name in ("train", "val", "test")] == [16, 2, 2]
    assert len(set().union(*contexts.values())) == 20
    assert [len(part) for part in data.examples.values()] == [48, 6, 6]
    (batch,) = batches(data, "test")[:1]
    assert batch["group"][0] == batch["group"][1] == batch["group"][2] != batch["group"][3]
    assert batch["id"].tolist() == [0, 1, 2, 3]
    fewer = made(tokenizer, path=path, counts=(10, 0, 2))
    assert [len(part) for part in fewer.examples.values()] == [10, 6, 2]
    assert fewer.examples == made(tokenizer, path=path, counts=(10, 0, 2)).examples
    assert set(fewer.examples["train"]) < set(data.examples["train"])
    test = official(tmp_path, ["Here is Oslo."], "dev.json", 1)
    given = made(tokenizer, path=path, eval_path=test, counts=None)
    assert [len(part) for part in given.examples.values()] == [54, 6, 1]
    assert given.data_hash() != data.data_hash()
    assert data.data_hash() == made(tokenizer, path=path, counts=None).data_hash()
    assert data.data_hash() != made(tokenizer, path=path, counts=None, template="seed").data_hash()


def test_synthetic_questions() -> None:
    parts = {name: synthetic_squad(name, 300, 42) for name in ("train", "val", "test")}
    for examples in parts.values():
        assert len(examples) == len({example.key for example in examples}) == 300
        for example in examples:
            start = example.starts[0]
            assert example.context[start:].startswith(example.answers[0])
            begin, end = example.context.rfind(".", 0, start) + 1, example.context.index(".", start)
            asked = ENTITIES.intersection(re.findall(r"\w+", example.question))
            assert asked <= set(example.context[begin:end].split())
    contexts = [{example.context for example in examples} for examples in parts.values()]
    assert not contexts[0] & contexts[1]
    assert not contexts[0] & contexts[2]
    assert synthetic_squad("train", 20, 42) == parts["train"][:20]
    assert synthetic_squad("train", 20, 43) != parts["train"][:20]
    some = synthetic_squad("test", 400, 42, unanswerable_share=0.3)
    assert 80 < sum(not example.answerable for example in some) < 160


def test_unanswerable_questions_have_a_word_for_it(tokenizer: Any) -> None:
    data = made(tokenizer, counts=(40, 5, 20), unanswerable=0.5)
    questions = [question for batch in batches(data, "test") for question in batch["questions"]]
    none = [question for question in questions if not question.example.answerable]
    assert 0 < len(none) < len(questions)
    assert all(question.judge(" unknown").correct == (question in none) for question in questions)
    for batch in batches(data, "train"):
        for row, text in enumerate(texts(batch, "answer", tokenizer)):
            if not batch["questions"][row].example.answerable:
                assert text == f" unknown{tokenizer.eos_token}"
                assert batch["span"][row].tolist() == [-1, -1]


def test_batches_come_through_a_loader(tokenizer: Any) -> None:
    data = made(tokenizer)
    data.trainer = SimpleNamespace(
        lightning_module=SimpleNamespace(tokenizer=tokenizer),
        world_size=1,
        global_rank=0,
        current_epoch=0,
        accumulate_grad_batches=1,
    )
    data.setup("fit")
    seen = [batch["id"].tolist() for batch in data.train_dataloader()]
    assert sorted(number for ids in seen for number in ids) == list(range(24))
    batch = next(iter(data.test_dataloader()))
    assert set(batch) == set(data.gives)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"split": (0.5, 0.1, 0.1)}, "data.split must be three shares"),
        ({"counts": (1, -1, 1)}, "data.counts must not be negative"),
        ({"eval_path": "x.json"}, "data.eval_path: has no effect"),
        ({"facts": (5, 4)}, "data.facts must be the fewest and the most"),
        ({"unanswerable": 1.5}, "data.unanswerable must lie between 0 and 1"),
        ({"context_length": 0}, "data.context_length must be at least 1"),
        ({"max_answer": 0}, "data.max_answer must be at least 1"),
    ],
)
def test_settings_that_are_none(settings: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Squad(**settings)
