"""In-context learning: labelled demonstrations that may be compressed, a query, and options for its answer."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence

from kvc.core import seeds
from kvc.core.datamodule import KvcDataModule, Rows, Split
from kvc.core.files import digest
from kvc.data.blocks import PAD_LABEL
from kvc.data.synthetic.base import document_text, rng_for
from kvc.data.synthetic.in_context import sample_in_context
from kvc.data.traces import read_records
from kvc.errors import UserError

SYNTHETIC = "synthetic:in_context"


class Query(NamedTuple):
    """One item.

    Attributes:
        id: Its number.
        demonstrations: Text of all of them.
        query: What follows them.
        options: Possible answers, each with what separates it from the query.
        gold: Number of the right one.
    """

    id: int
    demonstrations: str
    query: str
    options: tuple[str, ...]
    gold: int


class Demonstrations(KvcDataModule):
    r"""Queries about demonstrations, for evaluation alone: answers are chosen by likelihood.

    Batch: `id` `[B]`; the demonstrations as `input_ids`, `attention_mask` and `labels` `[B, T]`, T = `block_size`,
    padded on the right; `option_ids`, `option_mask` and `option_answer` `[B, O, Q]`, the query with each option, and
    which of its tokens are the answer; an option that only other queries have is all padding; `gold` `[B]`.

    Args:
        path: `synthetic:in_context`, or a JSON list or JSONL file with the keys `demonstrations` (a list of texts),
            `query`, `options` (a list of texts) and `answer` (a number, from 0 on). Demonstrations are joined as they
            are; an option follows the query as it is, with the space that it begins with.
        block_size: Tokens that the demonstrations may have.
        demonstrations: Number of synthetic demonstrations.
        count: Number of synthetic queries.
        limit: Use only the first so many records of a file; 0 uses all.
        data_seed: Seed of the synthetic queries.
        eval_batch_size: Queries of a batch.
        num_workers: Loader processes.
        seed: Has no effect: nothing is drawn.
    """

    gives: ClassVar[tuple[str, ...]] = (
        "id",
        "input_ids",
        "attention_mask",
        "labels",
        "option_ids",
        "option_mask",
        "option_answer",
        "gold",
    )

    def __init__(
        self,
        path: str = SYNTHETIC,
        block_size: int = 256,
        demonstrations: int = 16,
        count: int = 300,
        limit: int = 0,
        data_seed: int = seeds.DEFAULT_SEED,
        eval_batch_size: int = 20,
        num_workers: int = 0,
        seed: int = seeds.DEFAULT_SEED,
    ) -> None:
        super().__init__(None, eval_batch_size, num_workers, shuffle=False, seed=seed)
        if min(block_size, demonstrations, count) < 1:
            raise UserError("data.block_size, data.demonstrations and data.count must be at least 1")
        self.path, self.block_size, self.demonstrations = path, block_size, demonstrations
        self.count, self.limit, self.data_seed = count, limit, data_seed
        self._queries: list[Query] | None = None
        self.tokenizer: Any = None

    @property
    def queries(self) -> list[Query]:
        """All items, read or drawn once."""
        if self._queries is None:
            if self.path == SYNTHETIC:
                self._queries = [self._drawn(index) for index in range(self.count)]
            else:
                rows = list(read_records(Path(self.path)))
                rows = rows[: self.limit] if self.limit else rows
                self._queries = [_query(number, where, row) for number, (where, row) in enumerate(rows)]
        return self._queries

    def _drawn(self, index: int) -> Query:
        rng = rng_for("demonstrations", "test", self.data_seed, index)
        example = sample_in_context(rng, (self.demonstrations, self.demonstrations))
        turn = example.turns[0]
        options = tuple(f" {choice}" for choice in example.choices)
        gold = options.index(document_text(list(turn.answer)))
        return Query(index, example.material, turn.query + turn.lead, options, gold)

    def setup(self, stage: str) -> None:
        """Take the tokenizer of the method's base model."""
        self.tokenizer = self.trainer.lightning_module.tokenizer  # type: ignore[union-attr]

    def has_split(self, split: Split) -> bool:
        """There is a test split only."""
        return split == "test"

    def dataset(self, split: Split) -> Any:
        """Queries of the test split."""
        return Rows(self.queries if split == "test" else [])

    def collate(self, split: Split) -> Callable[[list[Any]], Any]:
        """Tokenises and pads."""
        return self._batch

    def data_hash(self) -> str:
        """Name of the queries."""
        return digest([self.queries, self.block_size])

    def describe(self) -> dict[str, Any]:
        """Source and size."""
        return {"source": self.path, "splits": {"test": len(self.queries)}}

    def _batch(self, queries: Sequence[Query]) -> dict[str, torch.Tensor]:
        bos = self.tokenizer.bos_token_id
        start = [] if bos is None else [bos]
        context, blocks = [], []
        for query in queries:
            ids = start + self._ids(query.demonstrations)
            if len(ids) > self.block_size:
                raise UserError(
                    f"data.block_size: the demonstrations of query {query.id} have {len(ids)} tokens, more than "
                    f"{self.block_size}"
                )
            context.append(torch.tensor(ids))
            asked = self._ids(query.query)
            blocks.append([(len(asked), torch.tensor(asked + self._ids(option))) for option in query.options])
        options = max(map(len, blocks))
        width = max(len(ids) for block in blocks for _, ids in block)
        option_ids = torch.zeros(len(queries), options, width, dtype=torch.int64)
        option_mask, option_answer = torch.zeros_like(option_ids), torch.zeros_like(option_ids, dtype=torch.bool)
        for row, block in enumerate(blocks):
            for column, (asked_tokens, whole) in enumerate(block):
                option_ids[row, column, : len(whole)] = whole
                option_mask[row, column, : len(whole)] = 1
                option_answer[row, column, asked_tokens : len(whole)] = True
        sizes = torch.tensor([len(ids) for ids in context])
        padded = pad_sequence(context, batch_first=True)
        padded = torch.nn.functional.pad(padded, (0, self.block_size - padded.shape[1]))
        mask = (torch.arange(self.block_size) < sizes[:, None]).long()
        return {
            "id": torch.tensor([query.id for query in queries]),
            "input_ids": padded,
            "attention_mask": mask,
            "labels": padded.masked_fill(mask == 0, PAD_LABEL),
            "option_ids": option_ids,
            "option_mask": option_mask,
            "option_answer": option_answer,
            "gold": torch.tensor([query.gold for query in queries]),
        }

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])


def _query(number: int, where: str, row: dict[str, Any]) -> Query:
    texts, query, options, answer = (row.get(key) for key in ("demonstrations", "query", "options", "answer"))
    for key, value in (("demonstrations", texts), ("options", options)):
        if not isinstance(value, list) or not value or not all(isinstance(text, str) and text for text in value):
            raise UserError(f"{where}: key {key!r} must be a list of texts")
    if not isinstance(query, str) or not query:
        raise UserError(f"{where}: key 'query' must be text")
    assert isinstance(texts, list)
    assert isinstance(options, list)
    if not isinstance(answer, int) or not 0 <= answer < len(options):
        raise UserError(f"{where}: key 'answer' must be the number of an option, from 0 to {len(options) - 1}")
    return Query(number, "".join(texts), query, tuple(options), answer)
