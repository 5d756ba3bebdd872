"""Cutting a text into segments, of given or random lengths."""

from collections.abc import Sequence

import torch

from kvc.errors import UserError


def split_lengths(length: int, segment_lengths: int | Sequence[int] | None) -> list[int]:
    """Lengths of the segments of a text.

    Args:
        length: Tokens of the text, L.
        segment_lengths: A number cuts into equal segments, of which the last may be shorter; a list must sum to L; None
            is one segment.

    Returns:
        Positive lengths that sum to L.

    Raises:
        UserError: If they do not.
    """
    if segment_lengths is None:
        return [length]
    if isinstance(segment_lengths, int):
        if segment_lengths < 1:
            raise UserError(f"segment_lengths: a segment needs at least one token, got {segment_lengths}")
        rest = length % segment_lengths
        return [segment_lengths] * (length // segment_lengths) + ([rest] if rest else [])
    lengths = [int(part) for part in segment_lengths]
    if any(part < 1 for part in lengths):
        raise UserError(f"segment_lengths: a segment needs at least one token, got {lengths}")
    if sum(lengths) != length:
        raise UserError(f"segment_lengths: {lengths} sum to {sum(lengths)}, but the text has {length} tokens")
    return lengths


def random_segment_lengths(
    length: int,
    segments: int,
    max_positions: int,
    generator: torch.Generator | None = None,
    min_length: int | None = None,
) -> list[int]:
    """Random lengths of which none exceeds the positions of the model.

    The cuts are distinct and uniform among those that leave every segment its least length. All but the first segment
    are longer than the least length.

    Args:
        length: Tokens of the text, L.
        segments: How many, n.
        max_positions: Most tokens of a segment, P.
        generator: Of the CPU; None takes the global one. Ranks that must agree give generators of one seed.
        min_length: Least tokens of a segment; None takes the smallest number, from 2 on, that keeps every segment
            within P.

    Returns:
        n lengths that sum to L.

    Raises:
        UserError: If L cannot be cut like this.
    """
    if segments < 1:
        raise UserError(f"segments_per_substep: at least one segment is needed, got {segments}")
    if segments == 1:
        return [length]
    needed = max(-(-(length - max_positions) // (segments - 1)), 2)
    least = needed if min_length is None else min_length
    if least < needed:
        raise UserError(f"min_length: segments of {least} tokens let another one exceed {max_positions} positions")
    free = length - segments * least
    if free < segments - 1:
        raise UserError(f"segment_lengths: {length} tokens cannot be cut into {segments} segments of at least {least}")
    cuts = torch.multinomial(torch.ones(free), segments - 1, generator=generator).sort().values.tolist()
    return [end - start + least for start, end in zip([0, *cuts], [*cuts, free])]
