"""TOVA: what the newest query attends to stays."""

import torch

from kvc.eviction.importance import causal_importance
from kvc.eviction.policy import Layer, Policy, View


class TOVA(Policy):
    """Keeps the keys with the largest attention of the newest query, averaged over all heads (Oren et al. 2024).

    All KV heads of a layer keep the same tokens. Only the newest token is exempt, as in the paper. Heads that hold
    unequal numbers of rows, after another policy, are rated one by one.
    """

    needs_queries = True

    def __init__(self) -> None:
        super().__init__(window=1)

    def score(self, view: View, past: int, layer: Layer) -> torch.Tensor:
        """Mean attention probability over the query heads, the same for every KV head."""
        assert view.queries is not None
        weights = causal_importance(view.queries, view.keys, window=1)
        return weights.mean((1, 2))[:, None].expand(-1, view.keys.shape[1], -1)
