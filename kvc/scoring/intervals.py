"""Means over questions with their intervals, from one set of resamples."""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from kvc.core.results import Value, bootstrap_mean, bootstrap_weights, interval
from kvc.core.seeds import DEFAULT_SEED


@lru_cache(maxsize=8)
def _weights(n: int) -> np.ndarray:
    """Share of each of n questions in each resample, the same for all arms and cells."""
    return bootstrap_weights(n, DEFAULT_SEED) / n


def mean(values: Sequence[float]) -> Value:
    """Mean with its 95 % interval: Wilson's where all values are 0 or 1, else the bootstrap's."""
    if np.isin(values, (0, 1)).all():
        return bootstrap_mean(values, DEFAULT_SEED)
    return difference(values)


def difference(values: Sequence[float]) -> Value:
    """Mean of paired differences with its bootstrap interval; 0 and 1 are no counts here."""
    data = np.asarray(values, dtype=float)
    return interval(data.mean(), _weights(len(data)) @ data, len(data))
