"""What trainable methods and untrained evaluations share: batches in, records out, a summary over all ranks."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.distributed
from lightning.pytorch import LightningModule

from kvc.core.results import Summary
from kvc.core.seeds import DEFAULT_SEED

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Batch = dict[str, torch.Tensor]
Record = dict[str, Any]


class KvcModule(LightningModule):
    """Base of `Method` and `Evaluation`.

    A subclass writes `records(batch)`, one JSON-able dict for each sample with at least the key `id`, and
    `summarize(records)`, a pure function of those dicts. `test` and `validate` run both; `predict` only the first.
    Records of all ranks are gathered, each sample once, in the order of their ids.

    Args:
        seed: Seed of every draw that the module makes itself.
    """

    needs: ClassVar[tuple[str, ...]] = ()
    """Keys that a batch must have; a datamodule that does not give them is refused before anything runs."""
    headline: ClassVar[tuple[str, ...]] = ()
    """The few metrics that tables show first; empty: the first ones."""

    def __init__(self, seed: int = DEFAULT_SEED) -> None:
        super().__init__()
        self.seed = seed
        self._records: list[Record] = []
        self.evaluated: tuple[list[Record], Summary | None] | None = None

    def records(self, batch: Batch) -> list[Record]:
        """Evaluate one batch: one dict a sample."""
        raise NotImplementedError(f"{type(self).__name__} does not say how to evaluate a batch")

    def summarize(self, records: Sequence[Record]) -> Summary:
        """Metrics with intervals, arms and paired differences from the records of every sample."""
        raise NotImplementedError(f"{type(self).__name__} does not say how to summarise records")

    def figures(self, records: Sequence[Record], summary: Summary) -> "dict[str, Figure]":
        """Pictures that explain the evaluation, by file name without suffix."""
        return {}

    def base_identity(self) -> dict[str, Any]:
        """Name and hash of the base model that the numbers belong to."""
        return {}

    def sizes(self) -> dict[str, int]:
        """Parameter counts for `result.json`."""
        return {
            "parameters": sum(p.numel() for p in self.parameters()),
            "trainable_parameters": sum(p.numel() for p in self.parameters() if p.requires_grad),
        }

    def on_test_start(self) -> None:
        """Forget records of an earlier evaluation."""
        self._records.clear()
        self.evaluated = None

    def on_predict_start(self) -> None:
        """Forget records of an earlier evaluation."""
        self.on_test_start()

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Collect the records of one batch."""
        self._records.extend(self.records(batch))

    def predict_step(self, batch: Batch, batch_idx: int) -> list[Record]:
        """Collect the records of one batch."""
        records = self.records(batch)
        self._records.extend(records)
        return records

    def on_test_epoch_end(self) -> None:
        """Gather all ranks and summarise; `evaluated` holds the outcome on every rank."""
        records = self._gather()
        self.evaluated = (records, self.summarize(records))

    def on_predict_epoch_end(self) -> None:
        """Gather all ranks; there is no summary, since predicting needs no gold answers."""
        self.evaluated = (self._gather(), None)

    def _gather(self) -> list[Record]:
        parts = [self._records]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            parts = [[] for _ in range(self.trainer.world_size)]
            torch.distributed.all_gather_object(parts, self._records)
        unique = {record["id"]: record for part in parts for record in part}
        return [unique[key] for key in sorted(unique)]
