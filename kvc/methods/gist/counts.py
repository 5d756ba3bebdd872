"""How many gist tokens a text gets."""

from dataclasses import dataclass
from typing import Protocol

import torch

from kvc.errors import UserError


class GistCount(Protocol):
    """Says how many gist tokens stand behind each text."""

    def counts(self, lengths: torch.Tensor) -> torch.Tensor:
        """K of each text, int64 `[B]`, from its tokens, int64 `[B]`; 0 leaves the text as it is."""
        ...


@dataclass(frozen=True)
class FixedGists:
    """The same number whatever the length.

    Attributes:
        gists: K; 0 is the plain language model on the whole text.
    """

    gists: int = 1

    def __post_init__(self) -> None:
        """Check the range.

        Raises:
            UserError: If the number is negative.
        """
        if self.gists < 0:
            raise UserError(f"count.gists must not be negative, got {self.gists}")

    def counts(self, lengths: torch.Tensor) -> torch.Tensor:
        """K for every text that has a token."""
        return torch.full_like(lengths, self.gists).masked_fill(lengths == 0, 0)


@dataclass(frozen=True)
class GistRatio:
    """One gist token for each `ratio` tokens, rounded up: K = ceil(n / r).

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
            raise UserError(f"count.ratio must be at least 1, got {self.ratio}")

    def counts(self, lengths: torch.Tensor) -> torch.Tensor:
        """ceil(n / r)."""
        return (lengths.double() / self.ratio).ceil().long()
