"""How much the last queries attend to the keys before them.

Shapes: B rows, Hk KV heads, G query heads per KV head, W queries, L keys, d head width.
"""

import math

import torch
from torch.nn import functional as F

from kvc.errors import UserError


def logits(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Scaled products of queries and keys, grouped by KV head.

    Args:
        queries: `[B, Hk * G, W, d]`, the query heads of one KV head side by side.
        keys: `[B, Hk, L, d]`.

    Returns:
        `[B, Hk, G, W, L]` in the dtype of the keys.
    """
    batch, kv_heads, _, width = keys.shape
    group, length = queries.shape[1] // kv_heads, queries.shape[2]
    stacked = queries.reshape(batch, kv_heads, group * length, width)
    return torch.unflatten(stacked @ keys.transpose(-1, -2) / math.sqrt(width), 2, (group, length))


def past_importance(queries: torch.Tensor, keys: torch.Tensor, window: int, kernel_size: int) -> torch.Tensor:
    """Importance as R-KV and its decode-time SnapKV take it (R-KV, section 3.2 and the released code).

    The largest logit of a group of query heads counts, the softmax runs over the keys before the window only, the mean
    over the queries is smoothed by a running maximum over neighbours in storage.

    Args:
        queries: `[B, Hq, W, d]`; the last `window` count.
        keys: `[B, Hk, L, d]`.
        window: Newest keys that are not rated.
        kernel_size: Width of the running maximum, odd.

    Returns:
        `[B, Hk, L - window]` in the dtype of the queries; only the softmax runs in float32.
    """
    largest = logits(queries[:, :, -window:], keys).amax(2)[..., :-window]
    mean = largest.softmax(-1, dtype=torch.float32).mean(-2).to(queries.dtype)
    return F.max_pool1d(mean, kernel_size, stride=1, padding=kernel_size // 2)


def causal_importance(queries: torch.Tensor, keys: torch.Tensor, window: int) -> torch.Tensor:
    """Attention probabilities that the last queries give to the keys before the window.

    Every query head has its own softmax over all keys that it may see, the window included.

    Args:
        queries: `[B, Hq, W, d]`; the last `window` count.
        keys: `[B, Hk, L, d]`; the last `window` are those of the queries, in order of time.
        window: Newest keys that are not rated.

    Returns:
        `[B, Hk, G, L - window]` in float32, the mean over the queries.
    """
    queries = queries[:, :, -window:]
    count, length = queries.shape[2], keys.shape[2]
    seen = torch.ones(count, length, dtype=torch.bool, device=keys.device).tril(length - count)
    masked = logits(queries, keys).masked_fill(~seen, -torch.inf)
    return masked.softmax(-1, dtype=torch.float32)[..., : length - window].mean(-2)


def check_kernel(kernel_size: int) -> None:
    """Refuse a pooling width that would shift or drop keys.

    Raises:
        UserError: If it is not a positive odd number.
    """
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise UserError(f"kernel_size: must be a positive odd number, got {kernel_size}")
