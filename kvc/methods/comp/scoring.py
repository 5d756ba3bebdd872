"""Metrics of the classifier and of the trivial rules it must beat."""

from collections.abc import Sequence

import numpy as np
import torch
from torchmetrics.functional.classification import binary_calibration_error

from kvc.core.module import Record
from kvc.core.ranking import Ranking
from kvc.core.results import Summary, Value, bootstrap, bootstrap_weights, interval

RESAMPLES = 1000


def summarize(records: Sequence[Record], threshold: float, rate: float, seed: int) -> Summary:
    """Score the classifier and every rule on the same positions; intervals resample traces.

    Args:
        records: With `id`, `scores`, `labels`, `newline` and `sentence`, one entry a reasoning token.
        threshold: The classifier fires at this probability or above; chosen on validation data.
        rate: Share of training tokens that a COMP follows: how often `random` fires, and 1 / n of `every n`.
        seed: Seed of the bootstrap and of the random rule.
    """
    labels = np.concatenate([np.asarray(r["labels"]) for r in records])
    units = np.repeat(np.arange(len(records)), [len(r["labels"]) for r in records])
    weights = bootstrap_weights(len(records), seed, RESAMPLES)
    scores = np.concatenate([np.asarray(r["scores"], dtype=float) for r in records])
    arms = rules(records, rate, seed)
    summary = Summary()
    ours, ours_resampled = _measure(scores, scores >= threshold, labels, units, weights)
    summary.metrics = ours
    tensors = torch.tensor(scores), torch.tensor(labels)
    summary.metrics["ece"] = Value(float(binary_calibration_error(*tensors, n_bins=15)), n=len(records))
    for name, (arm_scores, fires) in arms.items():
        theirs, theirs_resampled = _measure(arm_scores, fires, labels, units, weights)
        summary.arms[name] = theirs
        for metric in ("average_precision", "f1", "accuracy"):
            estimate = ours[metric].value - theirs[metric].value
            resampled = ours_resampled[metric] - theirs_resampled[metric]
            difference = interval(estimate, resampled, len(records))
            summary.differences.setdefault(metric, {})[name] = difference
    return summary


def rules(records: Sequence[Record], rate: float, seed: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Scores and decisions of the trivial rules, over all positions of all traces."""
    gap = max(1, round(1 / rate)) if rate > 0 else 1
    every = np.concatenate([(np.arange(len(r["labels"])) + 1) % gap == 0 for r in records])
    draws = np.concatenate([np.random.default_rng([seed, r["id"]]).random(len(r["labels"])) for r in records])
    newline = np.concatenate([np.asarray(r["newline"], dtype=bool) for r in records])
    sentence = np.concatenate([np.asarray(r["sentence"], dtype=bool) for r in records])
    return {
        "newline": (newline.astype(float), newline),
        "sentence": (sentence.astype(float), sentence),
        f"every {gap}": (every.astype(float), every),
        "random": (draws, draws >= 1 - rate),
    }


def _measure(
    scores: np.ndarray, fires: np.ndarray, labels: np.ndarray, units: np.ndarray, weights: np.ndarray
) -> tuple[dict[str, Value], dict[str, np.ndarray]]:
    """Every metric with its interval, and its bootstrap replicates for paired differences."""
    n = weights.shape[1]
    ranking = Ranking(scores, labels, units)
    ones = np.ones(n)
    estimates = {"average_precision": ranking.average_precision(ones), "roc_auc": ranking.roc_auc(ones)}
    resampled = {
        "average_precision": bootstrap(ranking.average_precision, weights),
        "roc_auc": bootstrap(ranking.roc_auc, weights),
    }
    per_unit = {
        "hits": np.bincount(units, fires & (labels == 1), n),
        "fired": np.bincount(units, fires, n),
        "true": np.bincount(units, labels == 1, n),
        "right": np.bincount(units, fires == (labels == 1), n),
        "tokens": np.bincount(units, minlength=n).astype(float),
    }
    per_unit["miscount"] = np.abs(per_unit["fired"] - per_unit["true"])
    for name, ratio in _decisions(per_unit, ones[None]).items():
        estimates[name] = float(ratio[0])
    resampled |= _decisions(per_unit, weights)
    return {name: interval(value, resampled[name], n) for name, value in estimates.items()}, resampled


def _decisions(per_unit: dict[str, np.ndarray], weights: np.ndarray) -> dict[str, np.ndarray]:
    """Metrics of yes-no decisions under each row of unit weights `[R, U]`."""
    total = {name: weights @ values for name, values in per_unit.items()}
    return {
        "f1": 2 * total["hits"] / np.maximum(total["fired"] + total["true"], 1),
        "precision": total["hits"] / np.maximum(total["fired"], 1),
        "recall": total["hits"] / np.maximum(total["true"], 1),
        "accuracy": total["right"] / total["tokens"],
        "count_error": total["miscount"] / weights.sum(-1),
    }
