"""From graded answers to F1 and exact match with intervals, what of the context was recovered, and real ratios."""

import warnings
from collections.abc import Sequence

import numpy as np

from kvc.core.module import Record
from kvc.core.results import Summary, Value, bootstrap_mean, bootstrap_weights, interval
from kvc.data.squad.grading import diversity
from kvc.data.squad.ratios import ratios
from kvc.methods.squad.baselines import METHOD

SCORES = ("f1", "em")
COSTS = (
    "kv_tokens_context",
    "kv_tokens_final",
    "kv_bytes_context",
    "kv_bytes_final",
    "new_tokens",
    "seconds",
    "compress_seconds",
    "prefill_seconds",
    "decode_seconds",
)


def summarize(records: Sequence[Record], seed: int, max_length: int) -> Summary:
    """Metrics of the method, of the arms on the same questions, and paired differences (method - arm).

    `f1` and `em` are shares, 0 to 1. `f1_recovered` and `em_recovered` say how much of what the full text is worth is
    kept: 0 is the model without context, 1 the one with the full text, both tuned where a tuned control stands beside;
    given where the interval of the difference of those two is above 0. `ratio` is all tokens over all slots,
    `ratio_mean` the mean over texts, `ratio_nominal` what a title would say, `expanded` the share of texts with more
    slots than tokens. `distinct` is the share of different predictions; where it is far below `distinct_gold`, a
    warning says that the compressor has collapsed, and `collapsed` is 1.

    Args:
        records: With `arms`, name to the record of each answer, the first `METHOD`; `context_tokens`, `group`, `gold`.
        seed: Seed of the bootstrap; all arms are resampled alike.
        max_length: Longest text that is read at once, for the nominal ratio.
    """
    n, summary = len(records), Summary()
    weights = bootstrap_weights(n, seed)
    columns = {
        arm: {key: np.array([record["arms"][arm][key] for record in records], dtype=float) for key in (*SCORES, *COSTS)}
        for arm in records[0]["arms"]
    }
    for arm, measured in columns.items():
        values = {key: bootstrap_mean(measured[key].tolist(), seed) for key in SCORES}
        values |= {key: _mean(measured[key], weights) for key in COSTS}
        if arm == METHOD:
            summary.metrics = values
            continue
        summary.arms[arm] = values
        for key in SCORES:
            difference = columns[METHOD][key] - measured[key]
            summary.differences.setdefault(key, {})[arm] = _mean(difference, weights)
    for key in SCORES:
        summary.metrics |= _recovered(key, {arm: measured[key] for arm, measured in columns.items()}, weights)
        summary.metrics |= _by_group(key, columns[METHOD][key], [record["group"] for record in records], seed)
    summary.metrics |= _ratios(records, weights, max_length)
    summary.metrics |= _diversity(records)
    return summary


def _mean(values: np.ndarray, weights: np.ndarray) -> Value:
    return interval(values.mean(), weights @ values / len(values), len(values))


def _recovered(key: str, scores: dict[str, np.ndarray], weights: np.ndarray) -> dict[str, Value]:
    """(m - m_without) / (m_full - m_without)."""
    full = scores.get("full_tuned", scores.get("full"))
    without = scores.get("no_context_tuned", scores.get("no_context"))
    if full is None or without is None:
        return {}
    possible, kept = full - without, scores[METHOD] - without
    resampled = weights @ possible / len(possible)
    if len(possible) < 2 or np.percentile(resampled, 2.5) <= 0:
        return {}
    share = (weights @ kept / len(kept)) / np.where(resampled == 0, np.nan, resampled)
    return {f"{key}_recovered": interval(kept.mean() / possible.mean(), share, len(kept))}


def _by_group(key: str, scores: np.ndarray, groups: Sequence[str], seed: int) -> dict[str, Value]:
    """Scores of each group: questions with and without an answer, or the tasks of a mixture; where there are two."""
    if len(set(groups)) < 2:
        return {}
    found = np.array(groups)
    return {f"{key}_{group}": bootstrap_mean(scores[found == group].tolist(), seed) for group in sorted(set(groups))}


def _ratios(records: Sequence[Record], weights: np.ndarray, max_length: int) -> dict[str, Value]:
    tokens = [record["context_tokens"] for record in records]
    slots = [record["arms"][METHOD]["kv_tokens_context"] for record in records]
    if min(slots) < 1:
        return {}
    found, n = ratios(tokens, slots, max_length), len(records)
    each = np.array(tokens) / np.array(slots)
    return {
        "ratio": interval(found.total, (weights @ np.array(tokens)) / (weights @ np.array(slots)), n),
        "ratio_mean": _mean(each, weights),
        "ratio_nominal": Value(found.nominal, n=n),
        "expanded": Value(found.expanded, n=n),
    }


def _diversity(records: Sequence[Record]) -> dict[str, Value]:
    found = diversity([record["answer"] for record in records], [record["gold"] for record in records])
    if found.collapsed:
        warnings.warn(
            f"the predictions are almost all the same ({found.predicted:.1%} are different, of the gold answers "
            f"{found.gold:.1%}): the model may answer without reading the slots",
            stacklevel=2,
        )
    n = len(records)
    return {
        "distinct": Value(found.predicted, n=n),
        "distinct_gold": Value(found.gold, n=n),
        "collapsed": Value(float(found.collapsed), n=n),
    }
