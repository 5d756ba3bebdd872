"""Metrics of a report from its records: by task and difficulty, with intervals and paired differences."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from kvc.core.module import Record
from kvc.core.results import Summary, Value, bootstrap_mean, bootstrap_weights, interval
from kvc.methods.lm.arms import FULL, SHORTCUT

# Name of a metric, what it divides by what; the counts are summed over items.
RATIOS = {
    "token_accuracy": ("right", "graded"),
    "step_accuracy": ("steps_right", "steps"),
    "kept": ("kept", None),
}


def summarize_arms(records: Sequence[Record], seed: int) -> Summary:
    """Every metric of every arm on each difficulty of each task, and on each task as a whole.

    Args:
        records: With `task`, `level`, `arms` (name to the fields of `Score`) and, after generation, `correct`.
        seed: Seed of the bootstrap; all arms are resampled alike.
    """
    groups: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        groups[record["task"]].append(record)
        groups[f"{record['task']}_{record['level']}"].append(record)
    summary = Summary()
    for group, members in groups.items():
        weights = bootstrap_weights(len(members), seed)
        names = dict.fromkeys(name for record in members for name in record["arms"])
        measured = {name: _measure([record["arms"].get(name) for record in members], weights) for name in names}
        if all("correct" in record for record in members):
            hits = [record["correct"] for record in members]
            summary.metrics[f"greedy/{group}"] = bootstrap_mean(hits, seed)
        for name, metrics in measured.items():
            values = summary.metrics if name == FULL else summary.arms.setdefault(name, {})
            values |= {f"{metric}/{group}": value for metric, (value, _) in metrics.items()}
            if name not in (FULL, SHORTCUT):
                _compare(summary, group, name, measured[FULL], metrics, len(members))
    return summary


Measured = dict[str, tuple[Value, np.ndarray]]


def _measure(scores: Sequence[dict[str, Any] | None], weights: np.ndarray) -> Measured:
    """Each metric with its value and its bootstrap replicates; items without a score (an empty shortcut) miss."""
    n = len(scores)
    exact = np.array([bool(score and score["exact"]) for score in scores], dtype=float)
    measured = {"exact_match": (bootstrap_mean(exact.tolist(), 0), weights @ exact / n)}
    if any(score is None or "nll" not in score for score in scores):
        return measured
    columns = {key: np.array([score[key] for score in scores if score], dtype=float) for key in scores[0] or {}}
    columns["one"] = np.ones(n)
    for metric, (top, bottom) in RATIOS.items():
        if bottom is None or columns[bottom].sum() > 0:
            measured[metric] = _ratio(columns[top], columns[bottom or "one"], weights)
    value, resampled = _ratio(columns["nll"], columns["tokens"], weights)
    measured["perplexity"] = (interval(np.exp(value.value), np.exp(resampled), n), np.exp(resampled))
    return measured


def _ratio(top: np.ndarray, bottom: np.ndarray, weights: np.ndarray) -> tuple[Value, np.ndarray]:
    resampled = (weights @ top) / (weights @ bottom)
    return interval(top.sum() / bottom.sum(), resampled, len(top)), resampled


def _compare(summary: Summary, group: str, arm: str, full: Measured, other: Measured, n: int) -> None:
    for metric in ("exact_match", "token_accuracy", "step_accuracy", "perplexity"):
        if metric in full and metric in other:
            (ours, ours_resampled), (theirs, theirs_resampled) = full[metric], other[metric]
            difference = interval(ours.value - theirs.value, ours_resampled - theirs_resampled, n)
            summary.differences.setdefault(f"{metric}/{group}", {})[arm] = difference
