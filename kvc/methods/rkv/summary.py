"""Accuracy and cost of every arm from the records of an eviction report."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from kvc.core.module import Record
from kvc.core.results import Summary, Value, bootstrap_mean, bootstrap_weights, interval

FULL, NO_CONTEXT = "full", "no context"
COSTS = ("kv_tokens_peak", "kv_tokens_mean", "kv_bytes_peak", "kv_bytes_mean", "compressions", "new_tokens")
SEPARATOR = "@"


def arm_name(policy: str, budget: int) -> str:
    """Name of an arm, such as `rkv@128`."""
    return f"{policy}{SEPARATOR}{budget}"


def policy_and_budget(arm: str) -> tuple[str, int] | None:
    """What `arm_name` joined; None for the other arms."""
    policy, _, budget = arm.rpartition(SEPARATOR)
    return (policy, int(budget)) if policy else None


def summarize(records: Sequence[Record], seed: int) -> Summary:
    """Every metric of every arm; units are questions, answers to the same question are averaged.

    Args:
        records: With `question` and `arms`.
        seed: Of the bootstrap; all arms are resampled alike.

    Returns:
        The full memory as the method; arms beside it; differences are full minus arm.
    """
    questions: dict[Any, list[Record]] = {}
    for record in records:
        questions.setdefault(record["question"], []).append(record["arms"])
    weights = bootstrap_weights(len(questions), seed)
    summary = Summary()
    means = {arm: _by_question(list(questions.values()), arm) for arm in records[0]["arms"]}
    for arm, columns in means.items():
        values = {name: _value(name, column, weights, seed) for name, column in columns.items()}
        if arm == FULL:
            summary.metrics = values
            continue
        summary.arms[arm] = values
        lost = means[FULL]["accuracy"] - columns["accuracy"]
        difference = interval(lost.mean(), weights @ lost / len(lost), len(lost))
        summary.differences.setdefault("accuracy", {})[arm] = difference
    return summary


def _by_question(questions: Sequence[Sequence[Record]], arm: str) -> dict[str, np.ndarray]:
    """Mean over the answers to each question, by metric."""

    def mean(read: Any) -> np.ndarray:
        return np.array([np.mean([read(arms[arm]) for arms in answers]) for answers in questions])

    columns = {"accuracy": mean(lambda answer: answer["correct"])}
    columns |= {name: mean(lambda answer, name=name: answer[name]) for name in COSTS}
    columns["fired"] = mean(lambda answer: answer["compressions"] > 0)
    columns["unfinished"] = mean(lambda answer: answer["finish"] == "length")
    return columns


def _value(name: str, column: np.ndarray, weights: np.ndarray, seed: int) -> Value:
    if name == "accuracy":
        return bootstrap_mean(column.tolist(), seed)
    return interval(column.mean(), weights @ column / len(column), len(column))
