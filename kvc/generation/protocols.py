"""What the decode loop tells a compressor after every forward, and what it asks of it."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from transformers import PreTrainedModel

from kvc.cache.memory import KVMemory
from kvc.cache.static import StaticMemory


class Progress(NamedTuple):
    """What is known after a forward; one entry per row of the batch, finished rows included, as they were at their end.

    Attributes:
        seen: Tokens of the row so far: prompt and evicted tokens count, padding does not.
        cached: Rows in memory now, the mean over layers.
        last_ids: Newest token in memory.
        tails: Decoded end of the text after the prompt, at least as long as the compressor asked for, so empty after
            the prefill; None where nothing is decoded.
    """

    seen: list[int]
    cached: list[int]
    last_ids: list[int]
    tails: list[str] | None = None


class Compressor(Protocol):
    """Makes the memory smaller while a model decodes."""

    @property
    def characters(self) -> int:
        """Length of the decoded text that it reads after every forward; 0 for none."""
        ...

    def begin(self, model: PreTrainedModel, memory: KVMemory) -> None:
        """A call of generate begins; nothing is left of an earlier one."""
        ...

    def after(self, progress: Progress, alive: Sequence[int]) -> list[int]:
        """A forward has ended: change the memory, or leave it.

        Args:
            progress: All rows of the batch.
            alive: The rows that are in memory, in their order there; -1 for one that has ended but keeps its place.

        Returns:
            Rows whose memory shrank, as numbers of the batch.
        """
        ...

    def select(self, rows: torch.Tensor) -> None:
        """The memory now has only these of its rows; one may come several times."""
        ...

    def capacity(self) -> list[int] | None:
        """Slots that each layer needs at most from here on; None where nothing bounds them."""
        ...

    def follow(self, memory: StaticMemory) -> None:
        """The rows have moved to this memory, and stay there until the call ends."""
        ...

    def end(self) -> None:
        """The call of generate has ended."""
        ...
