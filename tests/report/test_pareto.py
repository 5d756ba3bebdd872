import math
import random

import pytest

from kvc.report.pareto import front


@pytest.mark.parametrize(
    ("costs", "qualities", "expected"),
    [
        ([], [], []),
        ([5], [1], [0]),
        ([3, 1, 2], [0.9, 0.5, 0.4], [1, 0]),
        ([1, 1], [0.5, 0.6], [1]),  # same cost: only the better
        ([1, 2], [0.5, 0.5], [0]),  # same quality: only the cheaper
        ([1, 1, 2], [0.5, 0.5, 0.5], [0, 1]),  # equal points stand together
        ([1, 1, 1], [0.5, 0.6, 0.6], [1, 2]),
        ([1, math.nan, 0, math.inf], [0.5, 1, math.nan, 9], [0]),
    ],
)
def test_front(costs: list[float], qualities: list[float], expected: list[int]) -> None:
    assert front(costs, qualities) == expected


def test_losses_are_minimised() -> None:
    assert front([1, 2, 3], [0.5, 0.4, 0.45], lower_is_better=True) == [0, 1]


def test_front_is_what_nothing_dominates() -> None:
    draw = random.Random(0)
    for _ in range(200):
        points = [(draw.randrange(5), draw.randrange(5)) for _ in range(draw.randrange(12))]
        wanted = {
            i
            for i, (cost, quality) in enumerate(points)
            if not any(c <= cost and q >= quality and (c, q) != (cost, quality) for c, q in points)
        }
        found = front([c for c, _ in points], [q for _, q in points])
        assert set(found) == wanted
        assert [points[i][0] for i in found] == sorted(points[i][0] for i in found)


def test_lengths_must_agree() -> None:
    with pytest.raises(ValueError, match="shorter"):
        front([1, 2], [1])
