"""How the rows of a memory are stored: as they are, or as int8 or int4 codes.

A row is one key or value vector of one token and one KV head. Every stored form is a tuple of tensors
`[B, H, N, *]`, so appending, gathering and slicing work on all of them alike.

Shapes: B batch, H KV heads, N slots, D head dimension, G groups of a row.
"""

import math
from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from kvc.errors import UserError

Parts = tuple[torch.Tensor, ...]
Storage = Literal["full", "int8", "int4"]


class Codec(Protocol):
    """A stored form of rows. An empty slot is zero in every part, and reads as a zero row."""

    @property
    def storage(self) -> Storage:
        """Its name."""
        ...

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the parts, in order."""
        ...

    def encode(self, rows: torch.Tensor) -> Parts:
        """Rows `[B, H, N, D]` to parts."""
        ...

    def decode(self, parts: Parts, dtype: torch.dtype) -> torch.Tensor:
        """Parts to rows `[B, H, N, D]` of `dtype`."""
        ...


@dataclass(frozen=True)
class Full:
    """Rows as the model made them; gradients pass."""

    storage: Storage = "full"
    names: tuple[str, ...] = ("rows",)

    def encode(self, rows: torch.Tensor) -> Parts:
        """Rows in a storage of their own: a view of a fused projection would keep the whole projection alive."""
        rows = rows.contiguous()
        return (rows if rows.untyped_storage().nbytes() == rows.nbytes else rows.clone(),)

    def decode(self, parts: Parts, dtype: torch.dtype) -> torch.Tensor:
        """The stored tensor itself."""
        return parts[0].to(dtype)


@dataclass(frozen=True)
class Affine:
    """Asymmetric integer codes: row = low + scale * code, one `low` and `scale` (bf16) for every group of a row.

    A row is coded when it enters, once, and attention always reads the coded rows, those of the current step too:
    feeding a text at once or in pieces stores the same codes. The error of an element is at most half a step of its
    group, scale / 2.

    Args:
        storage: `int8` or `int4` (two codes a byte).
        group: Channels that share a scale; the head dimension where that is smaller or not a multiple of it.
    """

    storage: Storage
    group: int = 64
    names: tuple[str, ...] = ("codes", "scale", "low")

    @property
    def levels(self) -> int:
        """The largest code."""
        return 255 if self.storage == "int8" else 15

    def encode(self, rows: torch.Tensor) -> Parts:
        """Code rows `[B, H, N, D]`.

        Returns:
            Codes uint8 `[B, H, N, D]` (int4: `D / 2`), scale and low bf16 `[B, H, N, G]`.
        """
        groups = rows.detach().float().reshape(*rows.shape[:-1], -1, math.gcd(self.group, rows.shape[-1]))
        low, high = groups.amin(-1), groups.amax(-1)
        # Rounded so that low <= smallest and low + levels * scale >= largest: codes need no clipping.
        low = _below(low)
        scale = _above((high - low.float()) / self.levels)
        step = scale.float().clamp(min=torch.finfo(torch.float32).tiny)[..., None]
        codes = ((groups - low.float()[..., None]) / step).round().clamp(0, self.levels).to(torch.uint8).flatten(-2)
        if self.storage == "int4":
            first, second = codes.chunk(2, dim=-1)
            codes = first | (second << 4)
        return codes, scale, low

    def decode(self, parts: Parts, dtype: torch.dtype) -> torch.Tensor:
        """Rows `[B, H, N, D]`, computed in fp32 and rounded once."""
        codes, scale, low = parts
        if self.storage == "int4":
            codes = torch.cat([codes & 15, codes >> 4], dim=-1)
        groups = codes.reshape(*scale.shape, -1).float()
        return (groups * scale.float()[..., None] + low.float()[..., None]).flatten(-2).to(dtype)


def codec_of(storage: Storage, group: int = 64) -> Codec:
    """The codec of a name.

    Raises:
        UserError: If there is none of that name, or `group` is not positive and even.
    """
    if storage == "full":
        return Full()
    if storage not in {"int8", "int4"}:
        raise UserError(f"storage: '{storage}' is not one of full, int8, int4")
    if group < 2 or group % 2:
        raise UserError(f"group: {group} is not a positive even number of channels")
    return Affine(storage, group)


def _below(x: torch.Tensor) -> torch.Tensor:
    """A bf16 number not above `x`, at most two places away."""
    near = x.to(torch.bfloat16)
    return torch.where(near.float() > x, near - near.abs() * 2**-7, near)


def _above(x: torch.Tensor) -> torch.Tensor:
    """A bf16 number not below `x` >= 0, at most two places away."""
    near = x.to(torch.bfloat16)
    return torch.where(near.float() < x, near + near.abs() * 2**-7, near)
