"""From scores of last segments to losses with intervals, paired differences, and what of the context was recovered."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import rankdata

from kvc.core.module import Record
from kvc.core.results import Summary, Value, bootstrap_weights, interval

METHOD = "method"
RATIOS = {
    "loss": ("nll", "tokens"),
    "accuracy": ("right", "tokens"),
    "answer_loss": ("answer_nll", "answer_tokens"),
    "answer_accuracy": ("answer_right", "answer_tokens"),
}
RECOVERED = {"recovered": "loss", "answer_recovered": "answer_loss"}


class Ratio(NamedTuple):
    """A sum over blocks divided by another one: on all blocks, and on each resample of them."""

    value: float
    resampled: np.ndarray


def summarize(records: Sequence[Record], seed: int) -> Summary:
    """Metrics of the method, of its arms on the same blocks, and their paired differences (method - arm).

    `loss` is per token of the last segment, `perplexity` its exponential; `answer_loss` is per token that earlier facts
    tell. `recovered` is the share of what the full text saves of the loss without context that the method saves too,
    given where the interval of the former is above 0.

    Args:
        records: With `arms`, name to sums and what is held (`kv_*`), and `segments`.
        seed: Seed of the bootstrap; all arms are resampled alike.
    """
    n = len(records)
    weights = bootstrap_weights(n, seed)
    arms = {arm: [record["arms"][arm] for record in records] for arm in records[0]["arms"]}
    ratios = {arm: _ratios(scores, weights) for arm, scores in arms.items()}
    ours = ratios[METHOD]
    summary = Summary()
    for arm, scores in arms.items():
        values = {name: interval(ratio.value, ratio.resampled, n) for name, ratio in ratios[arm].items()}
        loss = ratios[arm]["loss"]
        values["perplexity"] = interval(np.exp(loss.value), np.exp(loss.resampled), n)
        values |= {
            name: mean([score[name] for score in scores], weights) for name in scores[0] if name.startswith("kv_")
        }
        if arm == METHOD:
            summary.metrics = values
            continue
        summary.arms[arm] = values
        for name, theirs in ratios[arm].items():
            difference = interval(ours[name].value - theirs.value, ours[name].resampled - theirs.resampled, n)
            summary.differences.setdefault(name, {})[arm] = difference
    if {"no_context", "full"} <= arms.keys():
        for name, loss_name in RECOVERED.items():
            if loss_name in ours:
                none, full = ratios["no_context"][loss_name], ratios["full"][loss_name]
                summary.metrics |= _recovered(name, none, ours[loss_name], full, n)
    summary.metrics |= _vectors(records, weights)
    return summary


def mean(values: Sequence[float], weights: np.ndarray) -> Value:
    """Mean over blocks of what is no yes or no, even where it happens to be 0 or 1."""
    column = np.array(values, dtype=float)
    return interval(column.mean(), weights @ column / len(column), len(column))


def _ratios(scores: Sequence[Record], weights: np.ndarray) -> dict[str, Ratio]:
    found = {}
    for name, keys in RATIOS.items():
        top, bottom = (np.array([score[key] for score in scores], dtype=float) for key in keys)
        if bottom.sum():
            found[name] = Ratio(top.sum() / bottom.sum(), (weights @ top) / np.maximum(weights @ bottom, 1))
    return found


def _recovered(name: str, none: Ratio, ours: Ratio, full: Ratio, n: int) -> dict[str, Value]:
    possible = none.resampled - full.resampled
    if np.percentile(possible, 2.5) <= 0:
        return {}
    saved = none.resampled - ours.resampled
    return {name: interval((none.value - ours.value) / (none.value - full.value), saved / possible, n)}


def _vectors(records: Sequence[Record], weights: np.ndarray) -> dict[str, Value]:
    """Vectors of a segment, and whether segments that tell more facts get more of them (rank correlation)."""
    blocks = [record["segments"] for record in records]
    if not all(blocks):
        return {}
    found = {"vectors": mean([np.mean([segment["vectors"] for segment in block]) for block in blocks], weights)}
    owner = np.array([row for row, block in enumerate(blocks) for _ in block])
    vectors, facts = (np.array([s[key] for block in blocks for s in block], float) for key in ("vectors", "facts"))
    if np.ptp(vectors) and np.ptp(facts):
        x, y = rankdata(vectors), rankdata(facts)
        estimate = _correlation(np.ones((1, len(x))), x, y)[0]
        found["facts_vectors_correlation"] = interval(estimate, _correlation(weights[:, owner], x, y), len(records))
    return found


def _correlation(weights: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Pearson's correlation under each row of weights; of ranks it is Spearman's."""
    total = weights.sum(-1)
    mean_x, mean_y = weights @ x / total, weights @ y / total
    covariance = weights @ (x * y) / total - mean_x * mean_y
    variances = (weights @ (x * x) / total - mean_x**2) * (weights @ (y * y) / total - mean_y**2)
    with np.errstate(invalid="ignore", divide="ignore"):
        correlation: np.ndarray = covariance / np.sqrt(variances)
    return correlation
