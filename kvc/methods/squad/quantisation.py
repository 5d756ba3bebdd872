"""Slots as int8 or int4 codes: less to store and to send. The language model reads them decoded, at full size.

Shapes: B batch, M slots, D width, G groups of a slot.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from kvc.errors import UserError
from kvc.methods.squad.budget import Budget
from kvc.methods.squad.interface import SlotCompressor, Slots
from kvc.methods.squad.mean_pool import MeanPool

SCALE_BYTES = 2


class Coded(NamedTuple):
    """Slots in coded form.

    Attributes:
        codes: int8 `[..., D]`; of 4 bits uint8 `[..., D / 2]`, two codes a byte.
        scale: fp16 `[..., G]`.
    """

    codes: torch.Tensor
    scale: torch.Tensor


@dataclass(frozen=True)
class SlotCode:
    """Symmetric codes: a slot is scale * code, with one scale for each group of channels, its largest entry's.

    Attributes:
        bits: 8 or 4.
        group: Channels that share a scale; null for the whole slot with 8 bits, and 64 with 4.
    """

    bits: Literal[8, 4] = 8
    group: int | None = None

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            UserError: If there is no such code.
        """
        if self.bits not in (8, 4):
            raise UserError(f"code.bits must be 8 or 4, got {self.bits}")
        if self.group is not None and self.group < 1:
            raise UserError(f"code.group must be at least 1, got {self.group}")

    def groups(self, width: int) -> int:
        """Groups of a slot.

        Raises:
            UserError: If the width is no multiple of the group, or odd with 4 bits.
        """
        size = self.group or (width if self.bits == 8 else min(64, width))
        if width % size or (self.bits == 4 and width % 2):
            raise UserError(f"code.group: slots of width {width} cannot be cut into groups of {size}")
        return width // size

    def wire_bytes(self, slots: int, width: int) -> int:
        """Bytes of so many slots: M (D bits / 8 + 2 G)."""
        return slots * (width * self.bits // 8 + SCALE_BYTES * self.groups(width))

    def encode(self, slots: torch.Tensor) -> Coded:
        """Code slots `[..., D]`."""
        rows = slots.detach().float().reshape(*slots.shape[:-1], self.groups(slots.shape[-1]), -1)
        most = 2 ** (self.bits - 1) - 1
        scale = (rows.abs().amax(-1) / most).to(torch.float16)
        # A group that is all but zero has a scale of 0 in fp16, and codes of 0.
        step = scale.float().clamp(min=torch.finfo(torch.float32).tiny)[..., None]
        codes = (rows / step).round().clamp(-most, most).masked_fill((scale == 0)[..., None], 0).flatten(-2)
        if self.bits == 8:
            return Coded(codes.to(torch.int8), scale)
        low, high = (codes + 8).to(torch.uint8).chunk(2, dim=-1)
        return Coded(low | (high << 4), scale)

    def decode(self, coded: Coded, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Slots `[..., D]` of coded ones."""
        codes, scale = coded
        if self.bits == 4:
            codes = torch.cat([codes & 15, codes >> 4], dim=-1).float() - 8
        rows = codes.float().reshape(*scale.shape, -1) * scale.float()[..., None]
        return rows.flatten(-2).to(dtype)

    def straight_through(self, slots: torch.Tensor) -> torch.Tensor:
        """Slots as they would come back, with the gradient of the slots as they were."""
        return slots + (self.decode(self.encode(slots), slots.dtype) - slots).detach()


class Quantised(SlotCompressor):
    """A compressor whose slots have been codes once.

    Evaluations always read coded slots. The last part of the training does, too, with gradients passed straight
    through; before, slots are as the compressor makes them.

    Args:
        width: D.
        rms: Root mean square of the output at the start, that of the embeddings.
        compressor: The compressor; `MeanPool` if null.
        code: How slots are coded; 8 bits if null.
        share: Part of the training, at its end, that sees codes; 0 codes after the training only.

    Raises:
        UserError: If the share is none, or the width does not fit the code.
    """

    def __init__(
        self,
        width: int,
        rms: float,
        compressor: Callable[[int, float], SlotCompressor] | None = None,
        code: SlotCode | None = None,
        share: float = 0.1,
    ) -> None:
        super().__init__(width, None)
        if not 0 <= share <= 1:
            raise UserError(f"compressor.share must lie between 0 and 1, got {share}")
        self.code, self.share = code or SlotCode(), share
        self.code.groups(width)
        self.inner = (compressor or MeanPool)(width, rms)
        self.most = self.inner.most

    @property
    def coding(self) -> bool:
        """Whether slots are coded now."""
        return not self.training or (self.share > 0 and self.progress >= 1 - self.share)

    def forward(self, states: torch.Tensor, mask: torch.Tensor, budget: Budget) -> Slots:
        """See `SlotCompressor`; `aux` also tells `wire_bytes` of each text, int64 `[B]`."""
        self.inner.with_weights = self.with_weights
        made = self.inner(states, mask, budget)
        each = self.code.wire_bytes(1, self.width)
        aux = {**made.aux, "wire_bytes": made.mask.sum(1) * each}
        slots = self.code.straight_through(made.slots) if self.coding else made.slots
        return Slots(slots, made.mask, aux)
