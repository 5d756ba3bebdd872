"""Blocks of long documents: nothing lost or doubled, splits apart, every source, clear errors."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

from kvc.core.backbone import Backbone
from kvc.data.documents import Documents
from kvc.errors import UserError

SPLITS = ("train", "val", "test")


class Running:
    """A trainer as far as a datamodule looks at it."""

    world_size, global_rank, current_epoch, accumulate_grad_batches = 1, 0, 0, 1

    def __init__(self) -> None:
        self.lightning_module = self
        self.tokenizer = Backbone().load_tokenizer()


def made(stage: str = "fit", **settings: Any) -> Documents:
    data = Documents(**settings)
    data.trainer = Running()
    data.setup(stage)
    return data


def blocks(data: Documents, split: Any) -> list[list[int]]:
    return [data.parts[split][index]["input_ids"].tolist() for index in range(len(data.parts[split]))]


def tokens(text: str) -> list[int]:
    return list(Backbone().load_tokenizer()(text, add_special_tokens=False)["input_ids"])


TEXT = "Emma lives in Paris. The lamp is in the hall. " * 40


@pytest.mark.parametrize("form", ["text", "folder", "jsonl", "list"])
def test_texts_are_cut_in_order_without_loss(form: str, tmp_path: Path) -> None:
    halves = [TEXT[: len(TEXT) // 2], TEXT[len(TEXT) // 2 :]]
    path = tmp_path / "source.txt"
    if form == "text":
        halves = [TEXT]
        path.write_text(TEXT)
    elif form == "folder":
        path = tmp_path / "many"
        path.mkdir()
        for number, half in enumerate(halves):
            (path / f"{number}.txt").write_text(half)
        (path / "picture.png").write_bytes(b"\x89PNG")
    else:
        records = [{"body": half} for half in halves]
        path = tmp_path / "source.jsonl"
        path.write_text(json.dumps(records) if form == "list" else "\n".join(map(json.dumps, records)))
    data = made(path=str(path), block_size=16, text_key="body")
    stream = [token for split in SPLITS for block in blocks(data, split) for token in block]
    whole = [token for half in halves for token in tokens(half)]
    assert stream == whole[: len(whole) // 16 * 16]
    sizes = [len(data.parts[split]) for split in SPLITS]
    assert sizes == pytest.approx([0.8 * sum(sizes), 0.1 * sum(sizes), 0.1 * sum(sizes)], abs=1)
    assert data.has_split("val")


def test_documents_may_be_separated_and_limited(tmp_path: Path) -> None:
    path = tmp_path / "source.jsonl"
    path.write_text("\n".join(json.dumps({"text": "The lamp is in the hall."}) for _ in range(100)))
    data = made(path=str(path), block_size=8, separate=True, limits=(4, 1, 2), split=(0.4, 0.2, 0.4))
    eos = Backbone().load_tokenizer().eos_token_id
    stream = [token for split in SPLITS for block in blocks(data, split) for token in block]
    assert stream == ([*tokens("The lamp is in the hall."), eos] * 9)[: 7 * 8]
    assert [len(data.parts[split]) for split in SPLITS] == [4, 1, 2]


def test_the_sample_is_read() -> None:
    data = made(path=str(Path(__file__).parents[2] / "data" / "samples" / "texts.jsonl"), block_size=8, split=(1, 0, 0))
    assert len(data.parts["train"]) >= 6
    assert not data.has_split("val")


def test_several_sources_are_joined(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / f"{name}.txt").write_text(f"The home of {'Emma' if name == 'one' else 'Karl'} is in Rome. " * 30)
    paths = [str(tmp_path / "one.txt"), str(tmp_path / "two.txt")]
    both = made(path=paths, block_size=8)
    alone = [made(path=path, block_size=8) for path in paths]
    for split in SPLITS:
        assert blocks(both, split) == [block for data in alone for block in blocks(data, split)]
        assert len(blocks(both, split)) >= 6


def rows(count: int, size: int = 12) -> dict[str, list[list[int]]]:
    ids = [[3 + (number + place) % 1000 for place in range(size)] for number in range(count)]
    return {"input_ids": ids, "attention_mask": [[1] * size] * count, "labels": ids}


@pytest.mark.parametrize("form", ["folder", "splits", "jsonl"])
def test_rows_that_are_tokenised_are_taken_as_they_are(form: str, tmp_path: Path) -> None:
    train, test = rows(20), rows(5, 9)
    train["attention_mask"] = [[1] * 8 + [0] * 4, *train["attention_mask"][1:]]
    path = tmp_path / "set"
    if form == "jsonl":
        path = tmp_path / "set.jsonl"
        path.write_text("\n".join(json.dumps({key: train[key][n] for key in train}) for n in range(20)))
    elif form == "folder":
        datasets.Dataset.from_dict(train).save_to_disk(path)
    else:
        parts = {"train": datasets.Dataset.from_dict(train), "test": datasets.Dataset.from_dict(test)}
        datasets.DatasetDict(parts).save_to_disk(path)
    data = made(path=str(path), block_size=10, limits=(0, 2, 0), batch_size=2)
    assert blocks(data, "train")[0] == train["input_ids"][0][:8]
    assert blocks(data, "train")[1] == train["input_ids"][1][2:]
    assert len(data.parts["val"]) == 2
    assert len(data.parts["test"]) == (5 if form == "splits" else 2)
    batch = data.collate("train")([(0, data.parts["train"][0]), (1, data.parts["train"][1])])
    assert batch["input_ids"].shape == (2, 10)
    assert batch["attention_mask"].sum(-1).tolist() == [8, 10]
    assert torch.equal(batch["labels"] == -100, batch["attention_mask"] == 0)
    if form == "splits":
        short = data.collate("test")([(0, data.parts["test"][0])])
        assert short["input_ids"].shape == (1, 10)
        assert int(short["attention_mask"].sum()) == 9
    assert data.data_hash() == Documents(path=str(path), block_size=10, limits=(0, 2, 0)).data_hash()
    assert data.data_hash() != Documents(path=str(path), block_size=9, limits=(0, 2, 0)).data_hash()


def test_the_end_of_a_synthetic_block_reminds_of_its_beginning() -> None:
    data = made(block_size=512, counts=(6, 2, 2))
    tokenizer = Backbone().load_tokenizer()
    answers: list[int] = []
    for index in range(6):
        block = data.parts["train"][index]
        assert {key: tuple(value.shape) for key, value in block.items()} == dict.fromkeys(block, (512,))
        text = tokenizer.decode(block["input_ids"])
        closing = tokenizer.decode(block["input_ids"][-128:])
        assert "looked at" not in closing
        answers.append(int(block["answer"][-128:].sum()))
        told = text[: text.rindex("Section")]
        for sentence in closing.split(".")[1:-1]:
            key = sentence.rsplit(" ", 1)[0].replace(" years", "").split()[-1]
            assert key in told
        assert int(block["fact"].sum()) == sum(
            "Remember" not in part and "looked" not in part and not part.lstrip().startswith(("On ", "Section"))
            for part in told.replace("\n", " ").split(". ")
            if len(part.split()) > 2
        )
        assert not block["fact"][-100:].any()
    assert min(answers) >= 1
    assert sum(answers) >= 6 * 7
    assert blocks(data, "train")[0] != blocks(data, "val")[0] != blocks(data, "test")[0]
    assert blocks(data, "train") == blocks(made(block_size=512, counts=(6, 2, 2)), "train")


def test_short_documents_are_told_in_one_half_and_reminded_of_in_the_other() -> None:
    data = made(path="synthetic:short_documents", block_size=128, counts=(40, 2, 2))
    tokenizer = Backbone().load_tokenizer()
    facts = []
    for index in range(40):
        block = data.parts["train"][index]
        assert len(block["input_ids"]) == 128
        halves = [tokenizer.decode(block["input_ids"][part]) for part in (slice(64), slice(64, 128))]
        assert "looked" in halves[1] or "On " in halves[1] or "Remember" in halves[1]
        told = int(block["fact"].sum())
        assert told == int(block["fact"][:64].sum())
        assert 1 <= int(block["answer"].sum()) <= told
        for place in block["answer"].nonzero().flatten().tolist():
            assert int(block["input_ids"][place]) in block["input_ids"][:64]
        facts.append(told)
    assert min(facts) <= 3
    assert max(facts) >= 7


def test_lessons_come_first_and_grow() -> None:
    data = made(block_size=512, counts=(272, 2, 2), lessons=0.94, batch_size=16)
    batches = list(data.train_dataloader())
    shapes = [tuple(batch["input_ids"].shape) for batch in batches]
    assert shapes == [(128, 32)] * 4 + [(64, 64)] * 4 + [(32, 128)] * 4 + [(16, 256)] * 4 + [(16, 512)]
    assert ["halves" in batch for batch in batches] == [True] * 16 + [False]
    order = [number for batch in batches for number in dict.fromkeys(batch["id"].tolist())]
    for start, stop in ((0, 64), (64, 128), (128, 192), (192, 256), (256, 272)):
        assert sorted(order[start:stop]) == list(range(start, stop)) != order[start:stop]
    other = made(block_size=512, counts=(272, 2, 2), lessons=0.94, batch_size=16, seed=7)
    assert order[:16] != next(iter(other.train_dataloader()))["id"].unique_consecutive().tolist()
    bos = Backbone().load_tokenizer().bos_token_id
    for batch in batches:
        assert bool((batch["input_ids"][:, 0] == bos).all())
        assert not bool((batch["input_ids"][:, 1:] == bos).any())
        assert {key: value.shape for key, value in batch.items() if key not in {"id", "halves"}} == dict.fromkeys(
            (key for key in batch if key not in {"id", "halves"}), batch["input_ids"].shape
        )
    assert tuple(next(iter(data.val_dataloader()))["input_ids"].shape) == (2, 512)
    ranks = [made(block_size=512, counts=(272, 2, 2), lessons=0.94, batch_size=8) for _ in range(2)]
    for rank, part in enumerate(ranks):
        part.trainer.world_size, part.trainer.global_rank = 2, rank
    for whole, *parts in zip(batches, *(part.train_dataloader() for part in ranks)):
        assert parts[0]["input_ids"].shape[1] == whole["input_ids"].shape[1]
        rows = {tuple(row) for part in parts for row in part["input_ids"].tolist()}
        assert rows == {tuple(row) for row in whole["input_ids"].tolist()}


def test_other_targets_are_thinned_out_in_lessons_alone() -> None:
    few, every = (made(block_size=512, counts=(300, 2, 2), lessons=0.85, other_targets=t) for t in (0.1, 1.0))
    kept = total = 0
    for index in range(20):
        block, whole = few.parts["train"][index], every.parts["train"][index]
        assert torch.equal(block["input_ids"], whole["input_ids"])
        target = block["labels"] != -100
        assert bool(target[block["answer"]].all())
        assert torch.equal(block["labels"][target], block["input_ids"][target])
        kept += int(target[~block["answer"]].sum())
        total += int((~block["answer"]).sum())
    assert 0.08 < kept / total < 0.12
    for split, index in (("train", 299), ("test", 0)):
        block = few.parts[split][index]
        assert torch.equal(block["labels"], block["input_ids"])
    assert few.data_hash() != every.data_hash()
    assert Documents(lessons=0.1).data_hash() != Documents().data_hash()
    assert Documents(path="synthetic:short_documents").data_hash() != Documents().data_hash()


def test_batches_of_an_epoch_hold_every_block_once() -> None:
    data = made(block_size=400, counts=(7, 2, 2), batch_size=3)
    seen = [number for batch in data.train_dataloader() for number in batch["id"].tolist()]
    assert sorted(seen) == list(range(7))
    assert seen != sorted(seen)
    batch = next(iter(data.val_dataloader()))
    assert set(batch) == {*Documents.gives, "answer", "fact"}
    assert set(Documents.gives) <= set(batch)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"path": "missing.txt"}, "there is no file or folder missing.txt"),
        ({"path": "short.txt", "block_size": 100}, "short.txt is too short for a train block of 100 tokens"),
        ({"path": "empty.txt"}, "empty.txt: is empty"),
        ({"path": "latin.txt"}, "latin.txt: is not UTF-8"),
        ({"path": "keys.jsonl"}, r"keys.jsonl line 1: neither 'text' \(text\) nor 'input_ids'"),
        ({"path": "mixed.jsonl"}, "mixes texts with records"),
        ({"path": "alien.jsonl", "block_size": 2, "split": (1, 0, 0)}, "holds the token 99999"),
        ({"path": "ragged.jsonl", "block_size": 2, "split": (1, 0, 0)}, "row 0: input_ids, attention_mask and labels"),
        ({"path": "bare"}, "the folder bare holds no"),
        ({"path": "hub:nobody/nothing"}, "hub:nobody/nothing cannot be loaded"),
        ({"path": ["synthetic:documents", "short.txt"]}, "or synthetic:documents alone"),
        ({"block_size": 1}, "data.block_size must be at least 2"),
        ({"block_size": 200}, "a synthetic document needs 250 tokens"),
        ({"closing": 512}, "data.closing must be smaller"),
        ({"split": (0.5, 0.1, 0.1)}, "data.split must be three shares"),
        ({"lessons": 1.5}, "data.lessons must be a share from 0 to 1"),
        ({"lessons": 0.5, "block_size": 500}, "data.lessons: data.block_size must be a multiple of 32"),
        ({"path": "short.txt", "lessons": 0.5}, "data.lessons: only synthetic documents"),
        ({"other_targets": 0.5}, "data.other_targets has no effect without data.lessons"),
        ({"limits": (-1, 0, 0)}, "data.limits must not be negative"),
    ],
)
def test_bad_input_is_one_sentence(
    settings: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bare").mkdir()
    Path("short.txt").write_text("Emma lives in Paris.")
    Path("empty.txt").write_text(" \n")
    Path("latin.txt").write_bytes(b"\xe9\xff")
    Path("keys.jsonl").write_text('{"body": "x"}\n')
    Path("mixed.jsonl").write_text('{"text": "x"}\n{"input_ids": [1]}\n')
    Path("alien.jsonl").write_text('{"input_ids": [99999, 5]}\n')
    Path("ragged.jsonl").write_text('{"input_ids": [5, 6], "labels": [5]}\n')
    with pytest.raises(UserError, match=message):
        made(**settings)
