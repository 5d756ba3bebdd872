"""Masks for a forward on a memory whose slots are not positions.

Order decides who sees whom: a new token sees every row that is kept and the new tokens before it. Positions decide
only inside a sliding window, because rows between may be missing.

Shapes: B batch, H KV heads, N slots, T new tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kvc.cache.rows import Rows
from kvc.errors import UserError


@dataclass(frozen=True)
class Incoming:
    """The tokens of the running forward.

    Attributes:
        positions: int64 `[B, T]`, -1 for padding.
        padded: Whether there is padding.
    """

    positions: torch.Tensor
    padded: bool


def filled(layer: Rows) -> torch.Tensor:
    """Slots `[B, H or 1, N]` that hold a row."""
    return layer.seen >= 0


def same_slots(layers: Sequence[Rows]) -> bool:
    """Whether all layers and heads have their empty slots in the same places, so that one mask fits all."""
    if len({layer.length for layer in layers}) > 1:
        return False
    if not any(layer.padded for layer in layers):
        return True
    first = filled(layers[0])[:, :1]
    return all(bool((filled(layer) == first).all()) for layer in layers)


def layer_mask(layer: Rows, incoming: Incoming, window: int | None) -> torch.Tensor | None:
    """Who sees whom in one layer.

    Args:
        layer: Rows from before the forward.
        incoming: Its tokens.
        window: Positions that a token looks back, itself included; None for all.

    Returns:
        bool `[B, H or 1, T, N + T]`, or None if everything is visible.
    """
    new = incoming.positions
    batch, size = new.shape
    if size == 1 and window is None and not layer.padded and not incoming.padded:
        return None
    seen = layer.seen.long() if layer.is_initialized else new.new_empty(batch, 1, 0)
    keys = torch.cat([seen, new[:, None].expand(-1, seen.shape[1], -1)], dim=2)[:, :, None]
    order = torch.ones(size, seen.shape[2] + size, dtype=torch.bool, device=new.device).tril(seen.shape[2])
    visible = order & (keys >= 0)
    if window is not None:
        visible = visible & (new[:, None, :, None] - keys < window)
    return visible


def form(visible: torch.Tensor | None, attention: str, groups: int, dtype: torch.dtype) -> torch.Tensor | None:
    """A mask in the form that an attention kernel takes.

    Args:
        visible: bool `[B, H or 1, T, N + T]` or None.
        attention: Name of the kernel.
        groups: Query heads per KV head.
        dtype: Of the hidden states.

    Raises:
        UserError: If the kernel takes no 4-D mask.
    """
    if visible is None:
        return None
    if attention.startswith("flash") or attention == "flex_attention":
        raise UserError(
            f"attn_implementation: {attention} takes no mask for each head, which a memory with different rows in "
            "layers or heads needs: use sdpa or eager"
        )
    if visible.shape[1] > 1:
        visible = visible.repeat_interleave(groups, dim=1)
    if attention == "sdpa":
        return visible
    zero = torch.zeros((), dtype=dtype, device=visible.device)
    return torch.where(visible, zero, torch.finfo(dtype).min)
