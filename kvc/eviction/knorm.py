"""Knorm: keys of small norm stay."""

import torch

from kvc.eviction.policy import Layer, Policy, View


class Knorm(Policy):
    """Keeps the keys with the smallest L2 norm (Devoto et al. 2024): they draw the most attention."""

    def score(self, view: View, past: int, layer: Layer) -> torch.Tensor:
        """Minus the norm of each key."""
        return -view.keys[:, :, :past].norm(dim=-1)
