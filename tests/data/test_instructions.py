"""Instruction data: parts, splits, what is cut and what is refused."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoTokenizer

from kvc.data.instructions import Instructions
from kvc.data.rouge import rouge
from kvc.errors import UserError

ROOT = Path(__file__).parents[2]
PATH = str(ROOT / "data" / "samples" / "instructions.jsonl")


def made(**settings: Any) -> Instructions:
    data = Instructions(**{"path": PATH, "split": (1, 0, 0), **settings})
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "data" / "tiny-lm")
    data.trainer = SimpleNamespace(lightning_module=SimpleNamespace(tokenizer=tokenizer))
    data.setup("fit")
    return data


def test_parts_are_the_prompt() -> None:
    data = made()
    for item in data.rows("train"):
        question = item["questions"]
        text = "".join(data.tokenizer.decode(item[part]) for part in ("head", "context", "tail"))
        assert text == data.tokenizer.bos_token + question.prompt
        assert data.tokenizer.decode(item["answer"]) == f" {question.gold}{data.tokenizer.eos_token}"
        assert question.prompt.endswith("\nOutput:")
        assert question.bare_prompt.startswith("Input: " if question.record.input else "Output:")
    batch = data.collate("train")(data.rows("train"))
    assert {"id", "questions", "head_ids", "context_mask"} <= batch.keys()


def test_named_test_sets_and_splits() -> None:
    data = made(eval_paths={"seen": PATH, "human": PATH}, split=(0.5, 0.25, 0.25))
    assert [len(data.parts[name]) for name in ("train", "val", "test")] == [3, 1, 8]
    assert [record.group for record in data.parts["test"]] == ["seen"] * 4 + ["human"] * 4
    kept = {record.instruction for record in [*data.parts["train"], *data.parts["val"]]}
    assert len(kept) == 4


def test_long_records_are_cut_or_dropped() -> None:
    sizes = [sum(len(item[part]) for part in ("head", "context", "tail")) for item in made().rows("train")]
    data = made(max_length=sorted(sizes)[2])
    rows = data.rows("train")
    assert len(rows) == sum(size < sorted(sizes)[2] for size in sizes)
    assert data.dropped == 4 - len(rows)
    for item in rows:
        assert sum(len(item[part]) for part in ("head", "context", "tail", "answer")) <= data.max_length
    with pytest.raises(UserError, match=r"data\.max_length: no instruction"):
        made(max_length=2).rows("train")


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"output": "x"}, r"line 1: key 'instruction' is missing"),
        ({"instruction": "x", "output": " "}, r"line 1: key 'output' is missing or no text"),
        ({"instruction": "x", "output": "y", "input": 3}, r"line 1: key 'input' is no text"),
    ],
)
def test_bad_records_are_named(tmp_path: Path, row: dict[str, Any], sentence: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(row))
    with pytest.raises(UserError, match=sentence):
        made(path=str(path)).rows("train")


def test_rouge() -> None:
    found = rouge("the cat sat", "the cat sat on it")
    assert found.rouge1 == pytest.approx(0.75)
    assert found.rouge2 == pytest.approx(2 * (1 * 0.5) / 1.5)
    assert rouge("sat the cat", "the cat sat").rouge_l == pytest.approx(2 / 3)
    assert rouge("", "the cat") == ("", 0, 0, 0)


def test_a_missing_stemmer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import kvc.data.rouge as module

    def missing(*args: Any, **kwargs: Any) -> None:
        raise ModuleNotFoundError("nltk")

    monkeypatch.setattr(module, "rouge_score", missing)
    with pytest.raises(UserError, match=r"data\.stemmer: true needs the package nltk"):
        made(stemmer=True)
