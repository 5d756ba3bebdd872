"""The Pareto front: what nothing else beats at both cost and quality."""

import math
from collections.abc import Sequence


def front(costs: Sequence[float], qualities: Sequence[float], lower_is_better: bool = False) -> list[int]:
    """Indices of the points on the front, from the cheapest to the best.

    A point is on the front unless another is at least as good at both and better at one. Equal points are on it
    together, or not at all; a point with a number that is not finite never is.

    Args:
        costs: What each point needs (bytes, tokens, seconds); less is better.
        qualities: What each point reaches.
        lower_is_better: Whether a small quality is a good one (a loss).
    """
    sign = -1.0 if lower_is_better else 1.0
    points = [
        (cost, -sign * quality, index)
        for index, (cost, quality) in enumerate(zip(costs, qualities, strict=True))
        if math.isfinite(cost) and math.isfinite(quality)
    ]
    found: list[int] = []
    best, at = math.inf, math.inf
    # By cost, then by quality: a point stays if it is better than all cheaper ones, or the same as the last that stays.
    for cost, loss, index in sorted(points):
        if loss < best:
            best, at = loss, cost
            found.append(index)
        elif loss == best and cost == at:
            found.append(index)
    return found
