"""What needs no compressor, measured once for a whole grid: the frozen model with the text, without it, with parts."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any, ClassVar

import torch

from kvc.core import seeds
from kvc.core.backbone import Backbone
from kvc.core.evaluation import Evaluation
from kvc.core.module import Batch, Record
from kvc.core.results import Summary
from kvc.methods.squad.baselines import METHOD, PLAIN, SIZED, Arms, label
from kvc.methods.squad.budget import Budget
from kvc.methods.squad.memory_size import row_bytes
from kvc.methods.squad.scoring import summarize

NEEDS = (
    "id",
    "questions",
    *(f"{part}_{kind}" for part in ("head", "context", "tail", "answer") for kind in ("ids", "mask")),
)


class TextBaselines(Evaluation):
    """Answers of the base model as it is: with the full text, without it, and with parts of it for each budget.

    A budget of M slots stands beside the first, last and random M tokens, and means of embeddings in as many windows.
    `model.baselines` of `ContextCompressor` takes the run folder.

    Args:
        backbone: Base model, without adapters.
        budgets: Budgets of the compressors that these baselines stand beside.
        max_length: Tokens of the pieces in which the compressors read longer texts.
        max_new_tokens: Limit of each answer.
        seed: Seed of random tokens and bootstrap.
    """

    needs: ClassVar[tuple[str, ...]] = NEEDS
    headline: ClassVar[tuple[str, ...]] = ("f1", "em", "kv_tokens_context", "kv_bytes_final")

    def __init__(
        self,
        backbone: Backbone | None = None,
        budgets: list[Budget] | None = None,
        max_length: int = 512,
        max_new_tokens: int = 32,
        seed: int = seeds.DEFAULT_SEED,
    ) -> None:
        super().__init__(seed)
        self.base = backbone or Backbone()
        self.budgets, self.max_length = budgets or [], max_length
        self.tokenizer = self.base.load_tokenizer()
        self.backbone = self.base.load().eval()
        self.arms = Arms(self.tokenizer, max_length, max_new_tokens, seed)
        self._identity = self.base.identity(seed)

    def base_identity(self) -> dict[str, Any]:
        """Name and hash of the base model."""
        return {"name": self.base.pretrained, "hash": self._identity}

    @cached_property
    def _row_bytes(self) -> float:
        return row_bytes(self.backbone)

    @torch.no_grad()
    def records(self, batch: Batch) -> list[Record]:
        """Answers of every arm; the first is the full text."""
        arms = {name: self.arms.records(self.backbone, batch, name, None, self._row_bytes) for name in PLAIN}
        for budget in self.budgets:
            for name in SIZED:
                found = self.arms.records(self.backbone, batch, name, budget, self._row_bytes)
                arms[f"{name} {label(budget)}"] = found
        return records_of(batch, {METHOD: arms["full"], **arms})

    def summarize(self, records: Sequence[Record]) -> Summary:
        """F1 and exact match of each arm, and what is kept in memory."""
        return summarize(records, self.seed, self.max_length)


def records_of(batch: dict[str, Any], arms: dict[str, list[Record]]) -> list[Record]:
    """One record a question: what the method said, and what every arm said.

    Args:
        batch: See `kvc.data.squad.Squad`.
        arms: Records of each arm, row by row.
    """
    lengths = batch["context_mask"].sum(1).tolist()
    records = []
    for row, (number, question) in enumerate(zip(batch["id"].tolist(), batch["questions"])):
        ours = arms[METHOD][row]
        about = {
            "question": question.example.question,
            "golds": list(question.example.answers),
            "gold": question.gold,
            "group": question.group,
            "context_tokens": lengths[row],
            "correct": ours["em"],
        }
        records.append({"id": number, **about, **ours, "arms": {name: rows[row] for name, rows in arms.items()}})
    return records
