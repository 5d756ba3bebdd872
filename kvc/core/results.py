"""What an evaluation says: numbers with intervals, of the method and of the arms it stands beside."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

RESAMPLES = 2000


@dataclass(frozen=True)
class Value:
    """One number with its 95 % interval.

    Attributes:
        value: The estimate on all units.
        low: Lower end of the 95 % interval; None where there is none.
        high: Upper end.
        n: Number of independent units (traces, questions) behind it.
    """

    value: float
    low: float | None = None
    high: float | None = None
    n: int | None = None

    def as_dict(self) -> dict[str, float]:
        """The fields that are set."""
        return {k: v for k, v in asdict(self).items() if v is not None}


@dataclass
class Summary:
    """Everything an evaluation reports.

    Attributes:
        metrics: Name to value, of the method itself.
        arms: Name of a baseline or control to its metrics, measured on the same units.
        differences: Metric to arm to the paired difference (method - arm).
    """

    metrics: dict[str, Value] = field(default_factory=dict)
    arms: dict[str, dict[str, Value]] = field(default_factory=dict)
    differences: dict[str, dict[str, Value]] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Plain nested dicts, ready for JSON."""
        return {
            "metrics": {k: v.as_dict() for k, v in self.metrics.items()},
            "arms": {arm: {k: v.as_dict() for k, v in values.items()} for arm, values in self.arms.items()},
            "differences": {m: {a: v.as_dict() for a, v in arms.items()} for m, arms in self.differences.items()},
        }


def interval(estimate: float, resampled: Sequence[float] | np.ndarray, n: int) -> Value:
    """Percentile 95 % interval from bootstrap replicates.

    Args:
        estimate: The statistic on the whole sample.
        resampled: The statistic on each resample.
        n: Number of units resampled.
    """
    if n < 2:
        return Value(float(estimate), n=n)
    low, high = np.nanpercentile(np.asarray(resampled, dtype=float), [2.5, 97.5])
    return Value(float(estimate), float(low), float(high), n)


def bootstrap_weights(n: int, seed: int, resamples: int = RESAMPLES) -> np.ndarray:
    """How often each of `n` units is drawn in each resample: `[resamples, n]` integers, each row summing to n.

    Arms measured with the same weights are compared pairwise on the same resamples.
    """
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples)


def bootstrap_mean(values: Sequence[float], seed: int, resamples: int = RESAMPLES) -> Value:
    """Mean of per-unit values with its 95 % interval: Wilson's for yes and no, else the bootstrap's."""
    data = np.asarray(values, dtype=float)
    if data.size == 0:
        raise ValueError("no values to average")
    if np.isin(data, (0, 1)).all():
        # A bootstrap of 100 hits in 100 would claim certainty.
        from scipy.stats import binomtest

        low, high = binomtest(int(data.sum()), data.size).proportion_ci(method="wilson")
        return Value(float(data.mean()), float(low), float(high), data.size)
    return interval(data.mean(), bootstrap_weights(len(data), seed, resamples) @ data / len(data), len(data))


def bootstrap(statistic: Callable[[np.ndarray], float], weights: np.ndarray) -> np.ndarray:
    """Apply `statistic(unit_weights)` to each row of `weights`; returns `[resamples]`."""
    return np.array([statistic(row) for row in weights])
