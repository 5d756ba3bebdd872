"""StreamingLLM: attention sinks and the most recent tokens stay."""

import torch

from kvc.errors import UserError
from kvc.eviction.policy import Layer, Policy, View


class StreamingLLM(Policy):
    """Keeps the first `sinks` tokens and the newest ones (Xiao et al. 2024); keys keep their original rotation.

    Args:
        sinks: Oldest tokens that stay; a longer protected prefix takes their place.

    Raises:
        UserError: If `sinks` is negative.
    """

    def __init__(self, sinks: int = 4) -> None:
        super().__init__(window=1)
        if sinks < 0:
            raise UserError(f"sinks: must not be negative, got {sinks}")
        self.sinks = sinks

    def least(self, prefix: int = 0) -> int:
        """Room for the sinks and the newest token."""
        return max(super().least(prefix), self.sinks + 1)

    def check(self, budget: int, prefix: int = 0) -> None:
        """Refuse a budget that leaves no room for the newest token.

        Raises:
            UserError: If the budget does not exceed sinks and prefix.
        """
        super().check(budget, prefix)
        if budget <= self.sinks:
            raise UserError(f"budget: {self.name} needs more tokens than its {self.sinks} sinks, got {budget}")

    def recent(self, budget: int, prefix: int = 0) -> int:
        """All of the budget that sinks and prefix leave."""
        return budget - max(self.sinks, prefix)

    def score(self, view: View, past: int, layer: Layer) -> torch.Tensor:
        """The older, the higher."""
        return -view.positions[..., :past].double()
