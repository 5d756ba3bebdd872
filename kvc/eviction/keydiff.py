"""KeyDiff: keys unlike the average key stay."""

import torch
from torch.nn import functional as F

from kvc.eviction.policy import Layer, Policy, View


class KeyDiff(Policy):
    """Keeps the keys least similar to the mean direction of all keys (Park et al. 2025)."""

    def score(self, view: View, past: int, layer: Layer) -> torch.Tensor:
        """Minus the cosine of each key and the mean of the normalised keys."""
        anchor = F.normalize(view.keys, dim=-1).mean(dim=2, keepdim=True)
        return -F.cosine_similarity(view.keys[:, :, :past], anchor, dim=-1)
