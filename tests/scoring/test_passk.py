"""pass@k against its closed form and against all draws there are; votes."""

from itertools import combinations
from math import comb

import numpy as np
import pytest

from kvc.scoring.equality import same
from kvc.scoring.passk import default_ks, majority, pass_at_k


def test_equals_the_closed_form_on_all_small_counts() -> None:
    for n in range(1, 17):
        counts = np.arange(n + 1)
        for k in range(1, n + 1):
            closed = [1 - comb(n - c, k) / comb(n, k) for c in range(n + 1)]
            np.testing.assert_allclose(pass_at_k(n, counts, k), closed, rtol=1e-12, atol=1e-15)


def test_is_the_mean_over_all_draws() -> None:
    n, c, k = 6, 2, 3
    draws = [any(index < c for index in draw) for draw in combinations(range(n), k)]
    assert pass_at_k(n, c, k) == pytest.approx(sum(draws) / len(draws), rel=1e-14)


def test_known_values() -> None:
    assert pass_at_k(16, 4, 1) == pytest.approx(0.25, rel=1e-15)
    assert pass_at_k([4, 4, 4], [0, 1, 4], 2).tolist() == pytest.approx([0.0, 0.5, 1.0])
    assert float(pass_at_k(16, 0, 16)) == 0.0
    assert float(pass_at_k(16, 13, 4)) == 1.0


def test_keeps_its_digits_on_large_counts() -> None:
    # Binomial coefficients of 10,000 overflow; 1 - 1e-8 as a float has lost half the digits of 1e-8.
    n, c, k = 10_000, 7, 500
    exact = 1 - comb(n - c, k) / comb(n, k)
    assert pass_at_k(n, c, k) == pytest.approx(exact, rel=1e-12)
    assert pass_at_k(10**16, 1, 1) == pytest.approx(1e-16, rel=1e-12)


def test_is_without_bias() -> None:
    # Mean over binomial counts = 1 - (1 - p)^k.
    n, k, p = 16, 5, 0.3
    chance = [comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(n + 1)]
    assert np.dot(chance, pass_at_k(n, np.arange(n + 1), k)) == pytest.approx(1 - (1 - p) ** k, rel=1e-12)


@pytest.mark.parametrize(("n", "c", "k"), [(4, 2, 5), (4, 2, 0), (4, 5, 1), ([16, 4], [1, 1], 8)])
def test_refuses_impossible_counts(n: object, c: object, k: int) -> None:
    with pytest.raises(ValueError, match=r"pass@|fewer"):
        pass_at_k(n, c, k)  # type: ignore[arg-type]


def test_default_ks() -> None:
    assert [default_ks(n) for n in (1, 2, 6, 16)] == [[1], [1, 2], [1, 2, 4, 6], [1, 2, 4, 8, 16]]


def test_majority() -> None:
    assert majority(["16", "2^4", "7"], [True, True, False], same) == ("16", 1.0)
    assert majority(["7", "7", "16", None, None, None], [False, False, True, False, False, False], same) == ("7", 0.0)
    assert majority(["7", "16"], [False, True], same) == ("7", 0.5)
    assert majority([None, None], [False, False], same) == (None, 0.0)
