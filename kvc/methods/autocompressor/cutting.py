"""How a block is cut into substeps, and these into segments."""

from collections.abc import Sequence
from itertools import pairwise

import torch

from kvc.errors import UserError
from kvc.methods.autocompressor.substeps import Substep, fixed_substeps, random_substeps

LEAST = 3
"""Tokens that every segment must be able to have."""


class Cutting:
    """Substeps of equal length, and segments of given, equal or random length in each.

    Args:
        substeps: Substeps of a block.
        segments: Segments of a substep; with given lengths, their number counts.
        lengths: Lengths of the segments of every substep; only the end of a longer block is used. Empty: equal lengths.
        random: Draw lengths in training.
        max_positions: Most tokens of a segment of random length.
        min_length: Least tokens of one; null: as few as `max_positions` lets it have.

    Raises:
        UserError: If the settings do not fit together.
    """

    def __init__(
        self,
        substeps: int,
        segments: int,
        lengths: Sequence[int],
        random: bool,
        max_positions: int,
        min_length: int | None = None,
    ) -> None:
        if substeps < 1:
            raise UserError(f"model.training_substeps must be at least 1, got {substeps}")
        if segments < 1:
            raise UserError(f"model.segments_per_substep must be at least 1, got {segments}")
        if any(length < 1 for length in lengths):
            raise UserError(f"model.segment_lengths must be positive, got {list(lengths)}")
        if lengths and random:
            raise UserError("model.segment_lengths: has no effect with randomize_substeps")
        if min_length is not None and not random:
            raise UserError("model.min_segment_length: has no effect without randomize_substeps")
        self.count, self.segments, self.given, self.random = substeps, segments, list(lengths), random
        self.max_positions, self.min_length = max_positions, min_length

    @property
    def total(self) -> int:
        """Segments of a block."""
        return self.count * (len(self.given) or self.segments)

    def substeps(self, tokens: int, generator: torch.Generator | None = None) -> list[Substep]:
        """Substeps of a block; they end where it ends.

        Args:
            tokens: Of the block.
            generator: Draws random lengths; without one, as in an evaluation, lengths are equal.

        Raises:
            UserError: If the block is too short.
        """
        if self.given:
            needed = sum(self.given) * self.count
            if needed > tokens:
                raise UserError(
                    f"data.block_size: {tokens} tokens are fewer than the {needed} that model.training_substeps "
                    f"{self.count} and model.segment_lengths {self.given} need"
                )
            return fixed_substeps(tokens, self.count, self.given)
        if tokens < LEAST * self.count * self.segments:
            raise UserError(
                f"data.block_size: {tokens} tokens are too few for model.training_substeps {self.count} and "
                f"model.segments_per_substep {self.segments}"
            )
        if self.random and generator is not None:
            settings = (self.count, self.segments, self.max_positions, generator, self.min_length)
            return random_substeps(tokens, *settings)
        edges = [tokens * k // self.count for k in range(self.count + 1)]
        return [Substep(start, stop, even(stop - start, self.segments)) for start, stop in pairwise(edges)]


def halves(tokens: int) -> list[Substep]:
    """One substep of two equal segments."""
    return [Substep(0, tokens, even(tokens, 2))]


def even(tokens: int, parts: int) -> list[int]:
    """Lengths that differ by at most 1 and sum to `tokens`."""
    edges = [tokens * k // parts for k in range(parts + 1)]
    return [stop - start for start, stop in pairwise(edges)]
