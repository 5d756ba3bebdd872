"""No eviction: the full-KV arm."""

import torch

from kvc.eviction.policy import Layer, Policy, View


class FullKV(Policy):
    """Keeps everything, whatever the budget: the arm that every policy is compared with."""

    evicts = False

    def __init__(self) -> None:
        super().__init__(window=1)

    def check(self, budget: int, prefix: int = 0) -> None:
        """Accept every budget, since none is applied."""

    def select(self, view: View, budget: int, *, prefix: int = 0, layer: Layer = 0) -> torch.Tensor:
        """All filled slots `[B, Hk, L]`, -1 for empty ones."""
        slots = torch.arange(view.positions.shape[-1], device=view.positions.device)
        return slots.expand(view.positions.shape).masked_fill(view.positions < 0, -1)

    def score(self, view: View, past: int, layer: Layer) -> torch.Tensor:
        """Equal scores: nothing is ever compared."""
        return view.keys.new_zeros((*view.keys.shape[:2], past))
