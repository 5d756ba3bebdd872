"""Traces as sequences: the tokens of the text without markers, and where its segments end."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from kvc.core.backbone import tiny_folder
from kvc.data.segments import SegmentedTraces


@pytest.fixture(scope="module")
def data() -> SegmentedTraces:
    made = SegmentedTraces(counts=(6, 2, 2), steps=(2, 4), batch_size=3)
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder())
    made.trainer = SimpleNamespace(lightning_module=SimpleNamespace(tokenizer=tokenizer))  # type: ignore[assignment]
    made.setup("fit")
    return made


def test_sequences_hold_prompt_solution_and_end(data: SegmentedTraces) -> None:
    rows = data.dataset("train")
    for index in range(len(rows)):
        row, trace = rows[0, index], data.traces["train"][index]
        text = data.tokenizer.decode(row["input_ids"])
        assert text.endswith(trace.text + "<|eos|>")
        assert "<COMP>" not in text
        prompt = data.tokenizer.decode(row["input_ids"][row["prompt"]])
        assert prompt.endswith("Solution:\n")
        assert torch.equal(row["labels"][~row["prompt"]], row["input_ids"][~row["prompt"]])
        assert (row["labels"][row["prompt"]] == -100).all()
        pieces = trace.reasoning_with_compression.split("<COMP>")
        assert int(row["cut"].sum()) == sum(bool(piece.strip()) for piece in pieces[1:])
        ends = row["cut"].nonzero().flatten().tolist()
        for end, piece in zip(ends, pieces):
            assert data.tokenizer.decode(row["input_ids"][: end + 1]).endswith(piece.strip()[-8:])
        assert not row["cut"][row["prompt"]].any()
        assert not row["cut"][-2:].any()


def test_a_marker_at_the_end_cuts_nothing(tmp_path: Path, data: SegmentedTraces) -> None:
    row = {"question": "q", "reasoning_with_compression": "1 + 1 = 2 <COMP>\n#### 2 <COMP>", "answer": "2"}
    path = tmp_path / "traces.json"
    path.write_text(json.dumps([{**row, "question": f"q{number}"} for number in range(3)]))
    made = SegmentedTraces(str(path), split=(1.0, 0.0, 0.0), only_valid=False)
    made.trainer = data.trainer
    made.setup("fit")
    item = made.dataset("train")[0, 0]
    (end,) = item["cut"].nonzero().flatten().tolist()
    assert made.tokenizer.decode(item["input_ids"][: end + 1]).endswith("1 + 1 = 2")


def test_an_empty_solution_cuts_nothing(tmp_path: Path, data: SegmentedTraces) -> None:
    row = {"question": "q", "reasoning_with_compression": "<COMP>", "answer": "2"}
    other = {"question": "p", "reasoning_with_compression": "1 + 1 = 2 <COMP>\n#### 2", "answer": "2"}
    path = tmp_path / "traces.json"
    path.write_text(json.dumps([row, other]))
    made = SegmentedTraces(str(path), split=(1.0, 0.0, 0.0), only_valid=False)
    made.trainer = data.trainer
    made.setup("fit")
    for index in range(2):
        item = made.dataset("train")[0, index]
        assert len(item["cut"]) == len(item["input_ids"])


def test_batches_are_padded_on_the_right(data: SegmentedTraces) -> None:
    rows = data.dataset("train")
    items: list[Any] = [rows[0, index] for index in range(4)]
    batch = data.collate("train")(items)
    assert set(batch) == set(data.gives)
    for line, item in enumerate(items):
        size = len(item["input_ids"])
        assert batch["attention_mask"][line].tolist() == [1] * size + [0] * (batch["input_ids"].shape[1] - size)
        assert torch.equal(batch["input_ids"][line, :size], item["input_ids"])
        assert not batch["cut"][line, size:].any()
        assert not batch["prompt"][line, size:].any()
        assert (batch["labels"][line, size:] == -100).all()
