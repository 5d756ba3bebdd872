"""What every way of summarising a segment has in common.

Shapes: B batch, n text tokens of a segment, k slots behind them, m vectors of the soft prompt, D width, V vocabulary.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from kvc.methods.autocompressor.softprompt import SoftPrompt
from kvc.methods.autocompressor.stack import Columns, Head, Stack
from kvc.methods.autocompressor.stopping import Draws


class Marked(NamedTuple):
    """Tokens of a text, with control tokens in it.

    Attributes:
        input_ids: int64 `[B, L]`.
        unscored: bool `[B, L]`, tokens that are no targets; None for none.
    """

    input_ids: torch.Tensor
    unscored: torch.Tensor | None


@dataclass(frozen=True)
class Segment:
    """A segment that was read, on which a summary is made.

    Attributes:
        hidden: Final hidden states of the text, `[B, n, D]`.
        slots: Final hidden states of the slots behind it, `[B, k, D]`.
        active: bool `[B]`, rows that have text in the segment; None for all.
        valid: bool `[B, n]`, False for padding.
        input_ids: int64 `[B, n]`; None where there were only embeddings.
        held: All columns read so far.
        cache: Their keys and values; None for a summary that needs none.
        prompt: The soft prompt before the segment.
    """

    hidden: torch.Tensor
    slots: torch.Tensor
    active: torch.Tensor | None
    valid: torch.Tensor
    input_ids: torch.Tensor | None
    held: Columns
    cache: Cache | None
    prompt: SoftPrompt


@dataclass(frozen=True)
class Report:
    """How a variable-length summary was made.

    Attributes:
        z: Raw vectors of every step, `[B, steps, D]`.
        stop: Probability of stopping at each step, fp32 `[B, steps]`.
        gate: Weight of each vector, fp32 `[B, steps]`: soft, or 0 and 1.
        expected_length: Sum of the gates, fp32 `[B]`.
        text_length: Tokens of the segment without control tokens, int64 `[B]`.
        memory_length: Vectors before the segment, int64 `[B]`.
        active: bool `[B]`, rows that were summarised.
        penalty: Length penalty of each row, fp32 `[B]`; 0 for rows that were not summarised.
        chance: Logarithm of the probability of the stop that was drawn, fp32 `[B]`, 0 for rows that were not
            summarised; None where none was drawn.
    """

    z: torch.Tensor
    stop: torch.Tensor
    gate: torch.Tensor
    expected_length: torch.Tensor
    text_length: torch.Tensor
    memory_length: torch.Tensor
    active: torch.Tensor
    penalty: torch.Tensor
    chance: torch.Tensor | None = None


class Summary(nn.Module, ABC):
    """Turns a segment that was read into a soft prompt for the next one."""

    needs_cache: bool = False
    """Whether summarising goes on from the keys and values of the segment."""

    def check(self, model: PreTrainedModel) -> None:
        """Refuse a model that the summary does not fit.

        Raises:
            UserError: If it does not.
        """

    def mark(self, input_ids: torch.Tensor, valid: torch.Tensor | None, lengths: list[int], count: int) -> Marked:
        """Put control tokens into a text.

        Args:
            input_ids: int64 `[B, L]`.
            valid: bool `[B, L]`, False for padding; None for no padding.
            lengths: Of the segments; they sum to L.
            count: How many of them, from the first on, are to be summarised.
        """
        return Marked(input_ids, None)

    def unwritable(self) -> list[int]:
        """Ids of the vocabulary that are never text."""
        return []

    def embed(self, embedding: nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
        """Input embeddings `[B, L, D]` of tokens."""
        embedded: torch.Tensor = embedding(input_ids)
        return embedded

    def logits(self, head: Head, hidden: torch.Tensor) -> torch.Tensor:
        """Logits `[..., V]` of text tokens, from final hidden states `[..., D]`."""
        return head(hidden)

    @abstractmethod
    def slots(self, embedding: nn.Module, embeddings: torch.Tensor) -> torch.Tensor:
        """What stands behind a segment that is summarised.

        Args:
            embedding: Input embeddings of the model.
            embeddings: Those of the segment, `[B, n, D]`.

        Returns:
            `[B, k, D]`.
        """

    @property
    def slots_are_text(self) -> bool:
        """Whether the slots take positions of text."""
        return False

    @abstractmethod
    def summarize(
        self, stack: Stack, segment: Segment, soft: bool, generator: Draws
    ) -> tuple[SoftPrompt, Report | None]:
        """The soft prompt after a segment.

        Args:
            stack: The model.
            segment: What was read; rows that are not active keep the soft prompt they have.
            soft: Differentiable, for summaries that stop.
            generator: Of random stops.
        """
