"""Queries about demonstrations: what is padded, what is the answer, what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from kvc.core.backbone import Backbone
from kvc.data.demonstrations import Demonstrations
from kvc.errors import UserError

ROWS = [
    {"demonstrations": ["a lamp\n", "a red bell\n"], "query": "Input: dog\nOutput:", "options": [" red", " blue"]},
    {"demonstrations": ["the map\n"], "query": "Input: cat\nOutput:", "options": [" gold", " red lamp", " hot"]},
]


class Running:
    world_size, global_rank, current_epoch, accumulate_grad_batches = 1, 0, 0, 1

    def __init__(self) -> None:
        self.lightning_module = self
        self.tokenizer = Backbone().load_tokenizer()


def made(**settings: Any) -> Demonstrations:
    data = Demonstrations(**settings)
    data.trainer = Running()
    data.setup("test")
    return data


def written(tmp_path: Path, *rows: dict[str, Any]) -> str:
    path = tmp_path / "queries.jsonl"
    path.write_text("\n".join(json.dumps({"answer": 1, **row}) for row in rows))
    return str(path)


def test_a_batch_reads_as_the_records_do(tmp_path: Path) -> None:
    data = made(path=written(tmp_path, *ROWS), block_size=20)
    tokenizer = data.tokenizer
    (batch,) = data.test_dataloader()
    assert set(batch) == set(Demonstrations.gives)
    assert batch["input_ids"].shape == (2, 20)
    assert batch["option_ids"].shape[:2] == (2, 3)
    for row, record in enumerate(ROWS):
        told = batch["input_ids"][row][batch["attention_mask"][row].bool()]
        assert tokenizer.decode(told[1:]) == "".join(record["demonstrations"])
        for column, option in enumerate(record["options"]):
            shown = batch["option_mask"][row, column].bool()
            answer = batch["option_answer"][row, column]
            assert tokenizer.decode(batch["option_ids"][row, column][shown]) == record["query"] + option
            assert tokenizer.decode(batch["option_ids"][row, column][answer]) == option
    assert not batch["option_mask"][0, 2].any()
    assert batch["gold"].tolist() == [1, 1]
    assert torch.equal(batch["labels"] == -100, batch["attention_mask"] == 0)


def test_synthetic_queries_have_their_answer_among_the_options() -> None:
    data = made(count=5, demonstrations=8)
    for query in data.queries:
        label = query.options[query.gold]
        assert query.demonstrations.count("Input:") == 8
        assert label.strip() in query.query
        assert query.query.endswith("Output:")
    assert data.queries == made(count=5, demonstrations=8).queries
    assert not data.has_split("train")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**ROWS[0], "demonstrations": "text"}, "line 1: key 'demonstrations' must be a list"),
        ({**ROWS[0], "options": []}, "key 'options' must be a list"),
        ({**ROWS[0], "query": None}, "key 'query' must be text"),
        ({**ROWS[0], "answer": 2}, "key 'answer' must be the number of an option, from 0 to 1"),
    ],
)
def test_bad_records_are_one_sentence(row: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        made(path=written(tmp_path, row)).queries  # noqa: B018


def test_demonstrations_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    data = made(path=written(tmp_path, *ROWS), block_size=4)
    with pytest.raises(UserError, match=r"data.block_size: the demonstrations of query 0"):
        next(iter(data.test_dataloader()))


def test_the_sample_is_read() -> None:
    data = made(path=str(Path(__file__).parents[2] / "data" / "samples" / "demonstrations.jsonl"), block_size=60)
    (batch,) = data.test_dataloader()
    assert batch["option_ids"].shape[:2] == (2, 2)
