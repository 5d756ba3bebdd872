"""How many slots a text may have: a fixed number, or a share of its length.

Shapes: B batch.
"""

from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from kvc.errors import UserError


class Budget(Protocol):
    """Says how many slots each text gets."""

    @property
    def window(self) -> float | None:
        """Tokens that one slot stands for, where that is fixed; None where the number of slots is."""
        ...

    def counts(self, lengths: torch.Tensor) -> torch.Tensor:
        """Slots of each text, int64 `[B]`, from its tokens, int64 `[B]`; a text without tokens has none."""
        ...

    def width(self, counts: torch.Tensor) -> int:
        """Columns of a batch of slots, M, at least 1."""
        ...


@dataclass(frozen=True)
class FixedSlots:
    """The same number of slots whatever the length.

    Attributes:
        slots: M, at least 1.
        policy: What becomes of a text of fewer than M tokens. `exact`: M slots all the same, so that it is expanded;
            `cap`: as many slots as it has tokens; `refuse`: an error.
    """

    slots: int = 64
    policy: Literal["exact", "cap", "refuse"] = "exact"

    def __post_init__(self) -> None:
        """Check the range.

        Raises:
            UserError: If there is no slot.
        """
        if self.slots < 1:
            raise UserError(f"budget.slots must be at least 1, got {self.slots}")

    @property
    def window(self) -> float | None:
        """None: the number of slots is fixed."""
        return None

    def counts(self, lengths: torch.Tensor) -> torch.Tensor:
        """M for every text that has a token; with `cap` never more than it has.

        Raises:
            UserError: With `refuse`, if a text is shorter than M.
        """
        short = lengths[(lengths > 0) & (lengths < self.slots)]
        if self.policy == "refuse" and len(short):
            raise UserError(
                f"budget.slots: {self.slots} slots are more than the {int(short.min())} tokens of a text, which the"
                " policy 'refuse' forbids; use fewer slots or the policy 'cap'"
            )
        most = lengths if self.policy == "cap" else torch.full_like(lengths, self.slots).masked_fill(lengths == 0, 0)
        return most.clamp(max=self.slots)

    def width(self, counts: torch.Tensor) -> int:
        """M."""
        return self.slots


@dataclass(frozen=True)
class FixedRatio:
    """One slot for each `ratio` tokens, rounded up: M = ceil(n / r).

    Attributes:
        ratio: r, at least 1.
    """

    ratio: float = 8.0

    def __post_init__(self) -> None:
        """Check the range.

        Raises:
            UserError: If the ratio expands.
        """
        if self.ratio < 1:
            raise UserError(f"budget.ratio must be at least 1, got {self.ratio}")

    @property
    def window(self) -> float | None:
        """The ratio."""
        return self.ratio

    def counts(self, lengths: torch.Tensor) -> torch.Tensor:
        """ceil(n / r)."""
        return (lengths.double() / self.ratio).ceil().long()

    def width(self, counts: torch.Tensor) -> int:
        """The largest count of the batch; waits for the device."""
        return max(1, int(counts.max())) if counts.numel() else 1


@dataclass(frozen=True, eq=False)
class GivenSlots:
    """Numbers that were worked out before, for a compressor inside another one, or chosen text by text.

    Attributes:
        given: Slots of each text, int64 `[B]`.
        columns: Columns of the batch of slots, M; as many as needed if None.
        window: Tokens that one slot stands for, where that is fixed.
    """

    given: torch.Tensor
    columns: int | None = None
    window: float | None = None

    def counts(self, lengths: torch.Tensor) -> torch.Tensor:
        """The given numbers; a text without tokens has no slots."""
        return self.given.masked_fill(lengths == 0, 0)

    def width(self, counts: torch.Tensor) -> int:
        """M; waits for the device where it is not given."""
        if self.columns is not None:
            return self.columns
        return max(1, int(counts.max())) if counts.numel() else 1
