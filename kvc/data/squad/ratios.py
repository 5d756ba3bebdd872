"""How much was compressed: real ratios beside the nominal one, and texts cut to the same number of tokens."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch

Keep = Literal["first", "last", "random"]


class Ratios(NamedTuple):
    """Compression of a set of texts.

    Attributes:
        nominal: Longest text that is read at once, over the most slots of a text: what a title would say.
        mean: Mean over texts of tokens over slots.
        total: All tokens over all slots.
        expanded: Share of texts with more slots than tokens.
    """

    nominal: float
    mean: float
    total: float
    expanded: float


def ratios(tokens: Sequence[int], slots: Sequence[int], max_length: int) -> Ratios:
    """Work out the ratios.

    Args:
        tokens: Length of each text, n.
        slots: Slots of each text, at least 1.
        max_length: Longest text that is read at once.

    Raises:
        ValueError: If there is no text, or one without slots.
    """
    if not tokens or len(tokens) != len(slots) or min(slots) < 1:
        raise ValueError("ratios need at least one text, and slots for each")
    each = [n / m for n, m in zip(tokens, slots)]
    expanded = sum(n < m for n, m in zip(tokens, slots)) / len(tokens)
    return Ratios(max_length / max(slots), sum(each) / len(each), sum(tokens) / sum(slots), expanded)


def keep_tokens(ids: Sequence[int], count: int, keep: Keep, generator: torch.Generator | None = None) -> list[int]:
    """A text cut to `count` tokens: the baseline that a compressor of as many slots must beat.

    Args:
        ids: Tokens of the text.
        count: M; a shorter text stays whole.
        keep: The first, the last, or random ones in their order.
        generator: Source of randomness, for random ones.
    """
    if count >= len(ids):
        return list(ids)
    if keep == "first":
        return list(ids[:count])
    if keep == "last":
        return list(ids[len(ids) - count :])
    chosen = torch.randperm(len(ids), generator=generator)[:count].sort().values
    return [ids[i] for i in chosen.tolist()]
