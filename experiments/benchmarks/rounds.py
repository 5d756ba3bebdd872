"""Arms that run in turn, and what their times say, with intervals.

Each round runs every arm once and begins with another one. Rounds are what intervals resample, the same for all arms,
so that a ratio or any other figure of several arms is compared within rounds. Figures are made of medians over rounds.
"""

import math
from collections.abc import Sequence

import numpy as np

from experiments.benchmarks.meters import Arm, peak_of, timed
from kvc.core.seeds import DEFAULT_SEED

UNITS = ("wall", "processor")
RESAMPLES = 2000
Medians = dict[str, np.ndarray]
"""Median seconds of each arm: of all rounds, then of each resample, `[1 + RESAMPLES]`."""


def run(arms: dict[str, Arm], rounds: int, device: str) -> list[dict[str, dict[str, float]]]:
    """Seconds of each arm, by round; every arm has run once before the clock starts."""
    names = list(arms)
    for name in names:
        arms[name]()
    found = []
    for turn in range(rounds):
        start = turn % len(names)
        found.append({name: timed(arms[name], device) for name in names[start:] + names[:start]})
    return found


def medians(found: Sequence[dict[str, dict[str, float]]], unit: str) -> Medians:
    """Median seconds of each arm in one of the `UNITS`."""
    drawn = np.random.default_rng(DEFAULT_SEED).integers(len(found), size=(RESAMPLES, len(found)))
    values = {name: np.array([one[name][unit] for one in found]) for name in found[0]}
    return {name: np.concatenate([[np.median(each)], np.median(each[drawn], axis=1)]) for name, each in values.items()}


def described(values: np.ndarray) -> dict[str, float | None]:
    """A figure with its 95 % interval, from its estimate and its resamples; None for infinite or not defined."""
    # No arithmetic between neighbours, which may be infinite.
    resampled = np.where(np.isnan(values[1:]), np.inf, values[1:])
    low, high = np.percentile(resampled, [2.5, 97.5], method="inverted_cdf")
    return {name: _number(value) for name, value in (("value", values[0]), ("low", low), ("high", high))}


def _number(value: float) -> float | None:
    return float(f"{value:.4g}") if math.isfinite(value) else None


def peaks(arms: dict[str, Arm], device: str) -> dict[str, int]:
    """Bytes that one run of each arm needs beyond what is there before it.

    On a CPU the process should give freed memory back at once, which `MALLOC_TRIM_THRESHOLD_` and
    `MALLOC_MMAP_THRESHOLD_` decide before it starts.
    """
    found = {}
    for name, arm in arms.items():
        arm()
        found[name] = peak_of(arm, device)
    return found
