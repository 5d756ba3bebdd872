"""H2O: heavy hitters, the keys that drew the most attention so far, stay beside the recent ones."""

import torch

from kvc.errors import UserError
from kvc.eviction.policy import Layer, Order, Policy, View


class H2O(Policy):
    """Keeps the keys with the largest accumulated attention, and the newest (Zhang et al. 2023).

    The mass of every row is summed over all queries since the row was written, prefill included, and over the query
    heads of its group; rows that were evicted take theirs with them. A new row has received little yet, so a share of
    the budget belongs to the newest rows whatever their score.

    Args:
        recent_ratio: Share of the budget (without the prefix) for the newest rows; the paper's value is one half.
        average: Divide the mass by the number of queries that could see the row, so that age is no merit.
        window: Newest rows that stay at least.
        order: See `Policy`.

    Raises:
        UserError: If a setting is out of range.
    """

    needs_attention = True

    def __init__(
        self, recent_ratio: float = 0.5, average: bool = False, window: int = 8, order: Order = "time"
    ) -> None:
        super().__init__(window, order)
        if not 0 <= recent_ratio < 1:
            raise UserError(f"recent_ratio: must be in [0, 1), got {recent_ratio}")
        self.recent_ratio = recent_ratio
        self.average = average

    def recent(self, budget: int, prefix: int = 0) -> int:
        """The share of the newest rows, the window at least."""
        return max(self.window, int((budget - prefix) * self.recent_ratio))

    def score(self, view: View, past: int, layer: Layer) -> torch.Tensor:
        """Accumulated attention, by the number of queries where averages are asked for."""
        assert view.attention is not None
        mass = view.attention[..., :past]
        if not self.average:
            return mass
        queries = view.positions[..., -1:] - view.positions[..., :past] + 1
        return mass / queries
