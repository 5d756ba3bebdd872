"""SnapKV: what the last queries attend to stays, with its neighbours."""

import torch
from torch.nn import functional as F

from kvc.eviction.importance import causal_importance, check_kernel, past_importance
from kvc.eviction.policy import Layer, Order, Policy, View


class SnapKV(Policy):
    """SnapKV for decoding, as the R-KV authors run it: the importance half of R-KV alone.

    The largest logit of a group counts, the softmax leaves the window out, neighbours are smoothed by a maximum.

    Args:
        window: Last queries that score; their keys always stay.
        kernel_size: Width of the running maximum, odd.
        order: See `Policy`.

    Raises:
        UserError: If a setting is out of range.
    """

    needs_queries = True

    def __init__(self, window: int = 8, kernel_size: int = 7, order: Order = "time") -> None:
        super().__init__(window, order)
        check_kernel(kernel_size)
        self.kernel_size = kernel_size

    def score(self, view: View, past: int, layer: Layer) -> torch.Tensor:
        """Smoothed importance in the dtype of the queries."""
        assert view.queries is not None
        return past_importance(view.queries, view.keys, self.window, self.kernel_size)


class SnapKVPrefill(SnapKV):
    """SnapKV for a prompt, as published (Li et al. 2024) and in kvpress.

    Every query head has its own causal softmax over all keys, window included; neighbours are smoothed by a mean; then
    the mean over the group counts.

    Args:
        window: Last queries of the prompt that score; their keys always stay.
        kernel_size: Width of the running mean, odd.
        order: See `Policy`.
    """

    def __init__(self, window: int = 64, kernel_size: int = 5, order: Order = "time") -> None:
        super().__init__(window, kernel_size, order)

    def score(self, view: View, past: int, layer: Layer) -> torch.Tensor:
        """Smoothed attention probability, float32."""
        assert view.queries is not None
        weights = causal_importance(view.queries, view.keys, self.window)
        kernel = self.kernel_size
        smooth = F.avg_pool1d(weights.flatten(1, 2), kernel, stride=1, padding=kernel // 2)
        return torch.unflatten(smooth, 1, weights.shape[1:3]).mean(2)
