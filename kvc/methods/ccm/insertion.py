"""Puts runs of memory tokens into sequences that say where their segments end.

Shapes: B batch, T tokens, T' tokens with memory tokens, n slots.
"""

from typing import NamedTuple

import torch


class Inserted(NamedTuple):
    """Sequences with memory tokens.

    Attributes:
        input_ids: `[B, T']`.
        attention_mask: `[B, T']`.
        place: Where each token went, int64 `[B, T]`.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    place: torch.Tensor

    def moved(self, flags: torch.Tensor) -> torch.Tensor:
        """Flags of tokens, bool `[B, T]`, at their new places `[B, T']`; False at memory tokens."""
        return torch.zeros_like(self.input_ids, dtype=torch.bool).scatter(1, self.place, flags)


def insert_runs(
    input_ids: torch.Tensor, attention_mask: torch.Tensor, cut: torch.Tensor, vocabulary: int, slots: int
) -> Inserted:
    """Put the memory tokens V .. V + n - 1 after every cut.

    Args:
        input_ids: `[B, T]`, padded on either side.
        attention_mask: `[B, T]`, 0 for padding.
        cut: bool `[B, T]`, tokens after which a run follows.
        vocabulary: V.
        slots: n.
    """
    cut = cut & attention_mask.bool()
    before = cut.long().cumsum(-1) - cut.long()
    batch, size = input_ids.shape
    place = torch.arange(size, device=input_ids.device) + slots * before
    total = size + slots * (int(cut.sum(-1).max()) if cut.numel() else 0)
    ids = input_ids.new_zeros(batch, total).scatter(1, place, input_ids)
    mask = attention_mask.new_zeros(batch, total).scatter(1, place, attention_mask)
    row, token = cut.nonzero(as_tuple=True)
    slot = torch.arange(slots, device=input_ids.device)
    run = place[row, token][:, None] + 1 + slot
    ids[row[:, None], run] = vocabulary + slot
    mask[row[:, None], run] = 1
    return Inserted(ids, mask, place)
