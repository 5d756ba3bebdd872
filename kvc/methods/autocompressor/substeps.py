"""A block cut into substeps: each is read and back-propagated alone, after the soft prompt of the one before.

Shapes: B batch, L tokens of the block.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch

from kvc.errors import UserError
from kvc.methods.autocompressor.compressor import Compressor, Reading
from kvc.methods.autocompressor.segments import random_segment_lengths
from kvc.methods.autocompressor.softprompt import SoftPrompt


@dataclass(frozen=True)
class Substep:
    """Columns of a block.

    Attributes:
        start: First column.
        stop: Column after the last one.
        segment_lengths: They sum to the number of columns.
    """

    start: int
    stop: int
    segment_lengths: list[int]

    @property
    def columns(self) -> slice:
        """Where they are in `[B, L]`."""
        return slice(self.start, self.stop)


def fixed_substeps(length: int, substeps: int, segment_lengths: Sequence[int]) -> list[Substep]:
    """Substeps of the same segments each, over the last columns of a block.

    Args:
        length: L.
        substeps: How many, K.
        segment_lengths: Of one substep; K times their sum is what is used of the block.

    Raises:
        UserError: If the block is shorter.
    """
    _check(substeps)
    lengths = [int(part) for part in segment_lengths]
    size = sum(lengths)
    if not lengths or min(lengths) < 1:
        raise UserError(f"segment_lengths: give at least one token for each segment, got {lengths}")
    if length < size * substeps:
        raise UserError(
            f"block_size: {length} tokens are fewer than the {size * substeps} that {substeps} substeps of the "
            f"segments {lengths} need"
        )
    first = length - size * substeps
    return [Substep(first + k * size, first + (k + 1) * size, lengths) for k in range(substeps)]


def random_substeps(
    length: int,
    substeps: int,
    segments: int,
    max_positions: int,
    generator: torch.Generator | None = None,
    min_length: int | None = None,
) -> list[Substep]:
    """Substeps of equal size, each cut at random; see `random_segment_lengths`.

    Args:
        length: L, all of which is used.
        substeps: How many, K.
        segments: Of each substep.
        max_positions: Most tokens of a segment.
        generator: Of the CPU; None takes the global one.
        min_length: Least tokens of a segment; None takes the least that keeps every segment within its positions.

    Raises:
        UserError: If the block is too short.
    """
    _check(substeps)
    edges = [length * k // substeps for k in range(substeps + 1)]
    return [
        Substep(start, stop, random_segment_lengths(stop - start, segments, max_positions, generator, min_length))
        for start, stop in pairwise(edges)
    ]


def substep_readings(
    compressor: Compressor,
    substeps: Sequence[Substep],
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    softprompt: SoftPrompt | None = None,
    output_softprompt: bool = False,
    **kwargs: Any,
) -> list[Callable[[], Reading]]:
    """Functions that read one substep each, to be called in order, each once.

    The soft prompt goes from one to the next, detached: a substep can be back-propagated before the next is read.

    Args:
        compressor: The model.
        substeps: Of the block, in order.
        input_ids: `[B, L]`.
        attention_mask: `[B, L]`, 0 for padding; None for no padding.
        softprompt: Before the first substep; None for none.
        output_softprompt: Summarise the last segment of the last substep too, which no segment reads.
        **kwargs: Passed on to `Compressor.read`.
    """
    carried: list[SoftPrompt | None] = [softprompt]

    def read(substep: Substep, last: bool) -> Reading:
        reading = compressor.read(
            input_ids[:, substep.columns],
            None if attention_mask is None else attention_mask[:, substep.columns],
            segment_lengths=substep.segment_lengths,
            softprompt=carried[0],
            output_softprompt=output_softprompt or not last,
            **kwargs,
        )
        carried[0] = reading.prompt.detach()
        return reading

    final = len(substeps) - 1
    return [partial(read, substep, index == final) for index, substep in enumerate(substeps)]


def _check(substeps: int) -> None:
    if substeps < 1:
        raise UserError(f"training_substeps: must be at least 1, got {substeps}")
