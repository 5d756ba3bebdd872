"""Positions of a sequence with memory tokens.

Shapes: B batch, T tokens.
"""

from typing import Literal

import torch

from kvc.core.masks import Layout

Positions = Literal["skip", "base"]


def position_ids(layout: Layout, rule: Positions) -> torch.Tensor:
    """Rotary position of every token of a whole sequence.

    Args:
        layout: What each place holds.
        rule: `skip`: memory tokens do not advance the counter; slot k gets p + 1 + k, where p is the position of the
            last ordinary token, and so does the ordinary token that follows the run (k = 0). `base`: every token
            counts.

    Returns:
        int64 `[B, T]`; 0 for padding.
    """
    counted = layout.valid & ~layout.memory if rule == "skip" else layout.valid
    positions = counted.long().cumsum(-1) - 1
    if rule == "skip":
        positions = positions + (layout.slot.long() + 1).masked_fill(~layout.memory, 0)
    return positions.masked_fill(~layout.valid, 0)


def advance(ordinary: torch.Tensor, slots: int, rule: Positions) -> torch.Tensor:
    """By how much a compressed chunk moves the next position.

    Args:
        ordinary: Ordinary tokens of the chunk, int `[B]`; a row without any is not compressed.
        slots: Memory tokens of a run.
        rule: See `position_ids`.

    Returns:
        int64 `[B]`.
    """
    if rule == "skip":
        return ordinary.long()
    return torch.where(ordinary > 0, ordinary + slots, 0).long()
