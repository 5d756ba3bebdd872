"""What every compressor takes and gives.

Shapes: B batch, S source tokens, D width, M slots.
"""

from typing import NamedTuple

import torch
from torch import nn

from kvc.errors import UserError
from kvc.methods.squad.budget import Budget


class Slots(NamedTuple):
    """A compressed batch.

    Attributes:
        slots: `[B, M, D]`; 0 where the mask is False.
        mask: bool `[B, M]`, slots that the text has; they come first.
        aux: What can be looked at: `weights` `[B, M, S]`, how much each slot takes of each token, where it is known.
    """

    slots: torch.Tensor
    mask: torch.Tensor
    aux: dict[str, torch.Tensor]


class Plan(NamedTuple):
    """A batch's budget, worked out.

    Attributes:
        lengths: Tokens of each text, int64 `[B]`.
        counts: Slots of each text, int64 `[B]`.
        mask: bool `[B, M]`, the first `counts` slots.
        window: Tokens that one slot stands for, where that is fixed.
    """

    lengths: torch.Tensor
    counts: torch.Tensor
    mask: torch.Tensor
    window: float | None


class SlotCompressor(nn.Module):
    """Base of the compressors: (source states, mask, budget) -> (slots, slot mask, aux).

    What a row gives does not depend on its padding or on the other rows. A row without tokens has no slots. Since one
    compressor serves any budget, a batch may have another one than the batch before.

    Args:
        width: D, of the source and of the language model that reads the slots.
        slots: Most slots of a text; None if the compressor has nothing that is made for each slot.
    """

    def __init__(self, width: int, slots: int | None) -> None:
        super().__init__()
        if slots is not None and slots < 1:
            raise UserError(f"compressor.slots must be at least 1, got {slots}")
        self.width = width
        self.most = slots
        self.with_weights = False
        """Also give the attention weights in `aux`, which costs memory for M x S numbers of each row."""
        self.progress = 0.0
        """Share of the training that is over; the method sets it before each step."""

    def forward(self, states: torch.Tensor, mask: torch.Tensor, budget: Budget) -> Slots:
        """Compress a batch.

        Args:
            states: `[B, S, D]`, padded on the right, in any floating type.
            mask: `[B, S]`, 0 or False for padding.
            budget: How many slots each row gets.

        Returns:
            Slots in the type of the compressor's weights.

        Raises:
            UserError: If the budget asks for more slots than the compressor has.
        """
        mask = mask.bool()
        lengths = mask.sum(-1)
        counts = budget.counts(lengths)
        total = budget.width(counts)
        if self.most is not None and total > self.most:
            raise UserError(
                f"budget: asks for {total} slots, more than the {self.most} of the compressor; raise compressor.slots"
            )
        slot_mask = torch.arange(total, device=mask.device) < counts[:, None]
        # Padding may hold anything, also numbers that are none.
        states = states.to(self._dtype(states)).masked_fill(~mask[..., None], 0.0)
        slots, aux = self.compress(states, mask, Plan(lengths, counts, slot_mask, budget.window))
        return Slots(slots.masked_fill(~slot_mask[..., None], 0.0), slot_mask, aux)

    def compress(
        self, states: torch.Tensor, mask: torch.Tensor, plan: Plan
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """What a compressor writes: slots `[B, M, D]` and `aux`; masked slots may hold any finite number.

        Args:
            states: `[B, S, D]`, 0 on padding.
            mask: bool `[B, S]`.
            plan: The budget.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say how to compress")

    def _dtype(self, states: torch.Tensor) -> torch.dtype:
        return next((p.dtype for p in self.parameters()), states.dtype)
