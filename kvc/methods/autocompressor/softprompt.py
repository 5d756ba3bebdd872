"""Soft prompts: the vectors that stand before a segment in place of the text that was compressed.

Shapes: B batch, m vectors, D width of the input embeddings.
"""

from dataclasses import dataclass, replace
from typing import Self

import torch


@dataclass(frozen=True)
class SoftPrompt:
    """Vectors for a batch whose rows may have different numbers of them.

    Attributes:
        vectors: `[B, m, D]`; zero where a row has none.
        mask: bool `[B, m]`, False where a row has no vector; None where every row has all m.
        log_gate: fp32 `[B, m]`, added to the attention logits of the vectors; None for nothing.
        uses: Segments through which the live gradient graph of the vectors was carried.
    """

    vectors: torch.Tensor
    mask: torch.Tensor | None = None
    log_gate: torch.Tensor | None = None
    uses: int = 0

    @classmethod
    def empty(cls, embeddings: torch.Tensor) -> Self:
        """No vectors, for a batch of embeddings `[B, T, D]`."""
        return cls(embeddings.new_zeros(len(embeddings), 0, embeddings.shape[-1]))

    @classmethod
    def of(cls, vectors: torch.Tensor, mask: torch.Tensor | None = None) -> Self:
        """Vectors that a user gives.

        Args:
            vectors: `[B, m, D]`.
            mask: `[B, m]`, 0 where a row has none. Without it a vector of zeros is none: so rows of different lengths
                come back right when only their vectors are handed on.

        Raises:
            ValueError: If the shapes do not fit.
        """
        if vectors.dim() != 3 or (mask is not None and mask.shape != vectors.shape[:2]):
            shapes = f"{[*vectors.shape]}" + ("" if mask is None else f" and {[*mask.shape]}")
            raise ValueError(f"softprompt: expected vectors [B, m, D] and a mask [B, m], got {shapes}")
        valid = vectors.detach().ne(0).any(-1) if mask is None else mask.bool()
        return cls(vectors, None if bool(valid.all()) else valid)

    @property
    def valid(self) -> torch.Tensor:
        """Which slots hold a vector, bool `[B, m]`."""
        if self.mask is None:
            return torch.ones(self.vectors.shape[:2], dtype=torch.bool, device=self.vectors.device)
        return self.mask

    @property
    def lengths(self) -> torch.Tensor:
        """Vectors of each row, int64 `[B]`."""
        return self.valid.sum(-1)

    def detach(self) -> "SoftPrompt":
        """The same numbers without their gradient graph."""
        gate = None if self.log_gate is None else self.log_gate.detach()
        return replace(self, vectors=self.vectors.detach(), log_gate=gate, uses=0)

    def to(self, like: torch.Tensor) -> "SoftPrompt":
        """On the device and in the precision of a tensor."""
        mask = None if self.mask is None else self.mask.to(like.device)
        gate = None if self.log_gate is None else self.log_gate.to(like.device)
        return replace(self, vectors=self.vectors.to(like), mask=mask, log_gate=gate)

    def expand(self, batch: int) -> "SoftPrompt":
        """One row for all rows of a batch; a batch stays as it is.

        Raises:
            ValueError: If it has another number of rows.
        """
        rows = len(self.vectors)
        if rows == batch:
            return self
        if rows != 1:
            raise ValueError(f"softprompt: {rows} rows do not fit a batch of {batch}")

        def wide(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.expand(batch, *tensor.shape[1:])

        mask = None if self.mask is None else wide(self.mask)
        gate = None if self.log_gate is None else wide(self.log_gate)
        return replace(self, vectors=wide(self.vectors), mask=mask, log_gate=gate)

    def append(self, other: "SoftPrompt") -> "SoftPrompt":
        """These vectors and others behind them."""
        if not self.vectors.shape[1]:
            return replace(other, uses=self.uses)
        if not other.vectors.shape[1]:
            return self
        plain = self.mask is None and other.mask is None
        gated = self.log_gate is not None or other.log_gate is not None
        return SoftPrompt(
            torch.cat([self.vectors, other.vectors], dim=1),
            None if plain else torch.cat([self.valid, other.valid], dim=1),
            torch.cat([self._gates, other._gates], dim=1) if gated else None,
            self.uses,
        )

    def packed(self) -> "SoftPrompt":
        """The same vectors in the same order, without slots that no row needs."""
        if self.mask is None:
            return self
        order = (~self.mask).long().argsort(dim=-1, stable=True)[:, : int(self.lengths.max())]
        wide = order[..., None].expand(-1, -1, self.vectors.shape[-1])
        gate = None if self.log_gate is None else self.log_gate.gather(1, order)
        return SoftPrompt(self.vectors.gather(1, wide), self.mask.gather(1, order), gate, self.uses)

    def where(self, rows: torch.Tensor, other: "SoftPrompt") -> "SoftPrompt":
        """These vectors in the rows bool `[B]`, and those of `other` in the rest."""
        width = max(self.vectors.shape[1], other.vectors.shape[1])
        one, two = self._wide(width), other._wide(width)
        gated = self.log_gate is not None or other.log_gate is not None
        return SoftPrompt(
            torch.where(rows[:, None, None], one.vectors, two.vectors),
            torch.where(rows[:, None], one.valid, two.valid),
            torch.where(rows[:, None], one._gates, two._gates) if gated else None,
            max(self.uses, other.uses),
        )

    @property
    def _gates(self) -> torch.Tensor:
        if self.log_gate is None:
            return torch.zeros(self.vectors.shape[:2], dtype=torch.float32, device=self.vectors.device)
        return self.log_gate

    def _wide(self, width: int) -> "SoftPrompt":
        """With slots without a vector at the end."""
        more = width - self.vectors.shape[1]
        if not more:
            return self
        empty = self.vectors.new_zeros(len(self.vectors), more, self.vectors.shape[2])
        mask = torch.zeros(empty.shape[:2], dtype=torch.bool, device=empty.device)
        gate = None if self.log_gate is None else torch.nn.functional.pad(self.log_gate, (0, more))
        return SoftPrompt(
            torch.cat([self.vectors, empty], dim=1), torch.cat([self.valid, mask], dim=1), gate, self.uses
        )
