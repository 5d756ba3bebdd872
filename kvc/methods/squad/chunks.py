"""Texts longer than a compressor reads at once: consecutive pieces, each compressed alone, the ratio as before.

Shapes: B batch, S tokens, C pieces of a row, P tokens of a piece, M slots of a piece.
"""

import torch
from torch.nn import functional as F

from kvc.methods.squad.interface import Slots


def split(ids: torch.Tensor, mask: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cut rows into pieces of `size` tokens, `[B * C, P]` each; the last piece of a row is shorter, or empty.

    Args:
        ids: `[B, S]`, padded on the right.
        mask: `[B, S]`.
        size: P; a batch no longer than this stays as it is.
    """
    if ids.shape[1] <= size:
        return ids, mask
    short = -ids.shape[1] % size
    return F.pad(ids, (0, short)).reshape(-1, size), F.pad(mask, (0, short)).reshape(-1, size)


def join(slots: Slots, batch: int) -> Slots:
    """The slots of all pieces of a row as one run, `[B, C * M, D]`; those of empty pieces are masked.

    Args:
        slots: Of `B * C` pieces.
        batch: B.
    """
    if len(slots.slots) == batch:
        return slots
    width = slots.slots.shape[-1]
    return Slots(slots.slots.reshape(batch, -1, width), slots.mask.reshape(batch, -1), {})
