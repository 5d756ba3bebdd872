"""How much a key resembles the others (R-KV, section 3.3), without ever holding an L x L matrix.

Shapes: B rows, Hk KV heads, N = B * Hk, L keys, d head width.
"""

from functools import lru_cache
from typing import Literal

import torch

from kvc.core.seeds import DEFAULT_SEED
from kvc.eviction.similar import kth_similar, last_similar, tile_size

Direction = Literal["last", "first", "last_percent", "first_percent"]
THRESHOLD = 0.5
_EPSILON = 1e-8


def redundancy(
    keys: torch.Tensor,
    direction: Direction = "last",
    ratio: float = 0.1,
    *,
    rounded: bool = False,
    projection: int | None = None,
) -> torch.Tensor:
    """Softmax over keys of each key's mean cosine with all keys, one exemption per row.

    With S the cosines, diagonal zero, row i does not count for the column r_i that it exempts: its newest neighbour of
    cosine above 0.5, or column 0 where it has none. The mean over rows of column j then is
    (k_j . M - k_j . k_j - sum of S[i, j] over rows i that exempt j) / L with M the sum of all normalised keys, so only
    r_i needs pairs, and `last_similar` finds it tile by tile.

    Args:
        keys: `[B, Hk, L, d]`.
        direction: Which similar neighbour is exempt. `last_percent` equals `last`, and `first` always exempts column 0:
            so the original computes them.
        ratio: Share of L that `first_percent` ranks by.
        rounded: Round every cosine and the mean to the dtype of the keys, as the original does in half precision; takes
            the pairs twice. Without, half-precision keys are computed with in float32.
        projection: Look for neighbours among keys projected at random to this width: faster, approximate. Column sums
            and the exempted cosines stay exact.

    Returns:
        `[B, Hk, L]`; in the dtype of the keys if `rounded`, else float32.
    """
    rows = keys.flatten(0, 1)
    if not rounded:
        rows = rows.float()
    unit = rows / (rows.norm(dim=-1, keepdim=True) + _EPSILON)
    exempt = _exempt(unit if projection is None else _project(rows, projection), direction, ratio)
    mean = _rounded_mean(unit, exempt) if rounded and keys.element_size() < 4 else _mean(unit, exempt)
    return torch.unflatten(mean.softmax(-1), 0, keys.shape[:2])


def _exempt(unit: torch.Tensor, direction: Direction, ratio: float) -> torch.Tensor:
    """`[N, L]`: the column that each row exempts."""
    length = unit.shape[1]
    if direction == "first":
        return torch.zeros(unit.shape[:2], dtype=torch.int64, device=unit.device)
    if direction == "first_percent":
        return kth_similar(unit, THRESHOLD, max(1, int(length * ratio)))
    return last_similar(unit, THRESHOLD)


def _mean(unit: torch.Tensor, exempt: torch.Tensor) -> torch.Tensor:
    """Mean of every column, by sums of vectors."""
    length = unit.shape[1]
    total = (unit * unit.sum(1, keepdim=True)).sum(-1) - unit.square().sum(-1)
    cosine = (unit * unit.gather(1, exempt[..., None].expand_as(unit))).sum(-1)
    # The diagonal is zero already, so a row that exempts itself takes nothing away.
    own = exempt == torch.arange(length, device=unit.device)
    return total.scatter_add(-1, exempt, -cosine.masked_fill(own, 0)) / length


def _rounded_mean(unit: torch.Tensor, exempt: torch.Tensor) -> torch.Tensor:
    """Mean of every column of cosines rounded one by one, a stripe of columns at a time."""
    parts = []
    for columns in torch.split(torch.arange(unit.shape[1], device=unit.device), tile_size(unit.device)):
        stripe = unit @ unit[:, columns].transpose(-1, -2)
        stripe[:, columns, columns - columns[0]] = 0
        parts.append(stripe.masked_fill(exempt[..., None] == columns, 0).mean(1))
    return torch.cat(parts, -1)


def _project(rows: torch.Tensor, width: int) -> torch.Tensor:
    """Unit vectors along the projections (Johnson and Lindenstrauss)."""
    short = rows @ _matrix(rows.shape[-1], width).to(rows)
    return short / (short.norm(dim=-1, keepdim=True) + _EPSILON)


@lru_cache(maxsize=8)
def _matrix(inner: int, width: int) -> torch.Tensor:
    return torch.randn(inner, width, generator=torch.Generator().manual_seed(DEFAULT_SEED)) / width**0.5
