"""How long variable-length summaries are in a validation, as numbers that add up over batches and ranks.

Shapes: B batch, T steps.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from kvc.methods.autocompressor.summary import Report

BINS = 50
"""Of probabilities of stopping."""


@dataclass
class Lengths:
    """Sums over the segments of all rows.

    Args:
        max_len: Most vectors of a segment.

    Attributes:
        expected: Sum of expected lengths, and their number, fp64 `[2]`.
        hard: Segments by the vectors that hard stops left them, fp64 `[max_len + 1]`.
        stop: Steps of the soft loop by their probability of stopping, fp64 `[BINS]`.
    """

    max_len: int
    expected: torch.Tensor = field(init=False)
    hard: torch.Tensor = field(init=False)
    stop: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.expected, self.hard, self.stop = (torch.zeros(n, dtype=torch.float64) for n in (2, self.max_len + 1, BINS))

    def add(self, soft: Sequence[Report], hard: Sequence[Report]) -> None:
        """Count a batch that was read with soft gates, and with hard stops."""
        for report in soft:
            lengths = report.expected_length[report.active]
            self.expected += torch.stack([lengths.double().sum(), lengths.new_tensor(len(lengths)).double()]).cpu()
            place = (report.stop[report.active] * BINS).long().clamp(max=BINS - 1).flatten()
            self.stop += torch.bincount(place.cpu(), minlength=BINS)
        for report in hard:
            made = report.expected_length[report.active].round().long()
            self.hard += torch.bincount(made.cpu(), minlength=self.max_len + 1)
