"""Training that begins with what a language model can already do, and ends with what it is to learn.

With few slots from the first step a model has to find out at once that slots say anything and what they say, and gets
no further than guessing. Where slots begin as the text itself, one for each token of a short text, it only has to keep
up.

Shapes: B batch, P context tokens.
"""

from dataclasses import dataclass
from typing import Any

import torch

from kvc.errors import UserError
from kvc.methods.squad.budget import Budget

Batch = dict[str, Any]


@dataclass(frozen=True)
class Lessons:
    """Short texts first, and one slot for each of their tokens; shares are of the whole training.

    Attributes:
        first: Tokens of the contexts at the start; a longer one is cut to a random stretch that holds the answer.
        last: Tokens that they have grown to, evenly, by `grown`.
        grown: Share after which contexts are whole; 0: from the start.
        around: Tokens before and after the answer that are never cut away.
        hold: Share during which every token has a slot.
        eased: Share after which the budget is the one that is asked for; between the two the number of slots shrinks
            by the same factor in each step. 0: from the start.
    """

    first: int = 24
    last: int = 224
    grown: float = 0.5
    around: int = 8
    hold: float = 0.1
    eased: float = 0.6

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            UserError: If one is wrong.
        """
        if not 1 <= self.first <= self.last:
            raise UserError(f"lessons.first must lie between 1 and lessons.last = {self.last}, got {self.first}")
        if self.around < 0:
            raise UserError(f"lessons.around must not be negative, got {self.around}")
        for name in ("grown", "hold", "eased"):
            if not 0 <= (value := getattr(self, name)) <= 1:
                raise UserError(f"lessons.{name} must lie between 0 and 1, got {value}")
        if 0 < self.eased <= self.hold:
            raise UserError(f"lessons.eased must be larger than lessons.hold = {self.hold}, or 0, got {self.eased}")

    def length(self, progress: float) -> int | None:
        """Tokens of a context at a share of the training; None for all of them."""
        if progress >= self.grown:
            return None
        return round(self.first + (self.last - self.first) * progress / self.grown)

    def shortened(self, batch: Batch, progress: float) -> Batch:
        """The batch with contexts as long as they are at a share of the training.

        Args:
            batch: See `kvc.data.squad.Squad`; `span` says where the answer stands.
            progress: Share of the training that is over.
        """
        size = self.length(progress)
        if size is None or size >= batch["context_ids"].shape[1]:
            return batch
        mask = batch["context_mask"].bool()
        lengths = mask.sum(1)
        low, high = batch["span"].unbind(1)
        # Without an answer any stretch will do.
        low, high = torch.where(low < 0, lengths, low - self.around), torch.where(low < 0, 0, high + self.around)
        high = torch.minimum(high, lengths)
        kept = torch.minimum((high - low.clamp(min=0)).clamp(min=size), lengths)
        first = (high - kept).clamp(min=0)
        last = torch.maximum(torch.minimum(low, lengths - kept), first)
        # From the global state, which checkpoints keep.
        drawn = torch.rand(len(lengths)).to(first.device)
        start = first + (drawn * (last - first + 1)).long().clamp(max=last - first)
        place = start[:, None] + torch.arange(int(kept.max()), device=start.device)
        valid = place < (start + kept)[:, None]
        ids = batch["context_ids"].gather(1, place.clamp(max=mask.shape[1] - 1)) * valid
        inside = torch.where(batch["span"] < 0, batch["span"], batch["span"] - start[:, None])
        return {**batch, "context_ids": ids, "context_mask": valid, "span": inside}

    def budget(self, budget: Budget, progress: float, most: int | None) -> Budget:
        """The budget at a share of the training.

        Args:
            budget: That which is asked for.
            progress: Share of the training that is over.
            most: Slots that the compressor can make; None for any number.
        """
        if progress >= self.eased:
            return budget
        return Eased(budget, max(0.0, (progress - self.hold) / (self.eased - self.hold)), most)


@dataclass(frozen=True)
class Eased:
    """A number of slots between that of the tokens, n, and that of a budget, m: n^(1 - share) m^share.

    Attributes:
        budget: The budget.
        share: How far it has come, from 0 to 1.
        most: Slots that the compressor can make; None for any number.
    """

    budget: Budget
    share: float
    most: int | None = None

    @property
    def window(self) -> float | None:
        """Tokens that one slot stands for, where that is fixed and no limit is in the way."""
        ratio = self.budget.window
        # Rounded, so that 3.9999999 does not ask for a slot more.
        return None if ratio is None or self.most is not None else round(ratio**self.share, 6)

    def counts(self, lengths: torch.Tensor) -> torch.Tensor:
        """Slots of each text, int64 `[B]`."""
        asked = self.budget.counts(lengths)
        eased = (lengths.double() ** (1 - self.share) * asked.double() ** self.share - 1e-6).ceil().long()
        if self.window is not None:
            eased = (lengths.double() / self.window).ceil().long()
        return eased if self.most is None else torch.maximum(eased.clamp(max=self.most), asked)

    def width(self, counts: torch.Tensor) -> int:
        """The largest count of the batch; waits for the device."""
        return max(1, int(counts.max())) if counts.numel() else 1
