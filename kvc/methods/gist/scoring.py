"""Metrics of an evaluation: scores, what was compressed and what it cost, with intervals and paired differences."""

from collections.abc import Sequence

import numpy as np

from kvc.core.module import Record
from kvc.core.results import Summary, Value, bootstrap_mean, bootstrap_weights, interval
from kvc.data.squad.grading import diversity

METHOD, FULL, NO_CONTEXT = "method", "full", "no_context"
TRAINED = "trained_"
"""Before the name of an arm: with the trained weights, where the plain name is the base model."""
GRADES = ("em", "f1", "rouge1", "rouge2", "rouge_l", "correct")
COSTS = ("kv_tokens_peak", "kv_bytes_peak", "kv_tokens_final", "new_tokens", "read_seconds", "prefill_seconds")


def summarize(records: Sequence[Record], seed: int) -> Summary:
    """Metrics of the method and of its arms on the same questions, and their paired differences.

    `NAME_normalised` is the share of what the full text brings over no context that the method brings too, with the
    trained weights where these arms exist; it is given where the full text brings something. `ratio` is tokens of the
    contexts over gist tokens, `expanded` the share of contexts with more gist tokens than tokens, `distinct` the number
    of different answers by that of different gold answers, and `collapsed` 1 where they are suspiciously few.

    Args:
        records: With `arms`, name to scores and costs; `group`, `context_tokens` and `gists`.
        seed: Of the bootstrap; all arms are resampled alike.
    """
    n = len(records)
    weights = bootstrap_weights(n, seed)
    arms = {name: [record["arms"][name] for record in records] for name in records[0]["arms"]}
    grades = [name for name in GRADES if name in arms[METHOD][0]]
    columns = {arm: {name: _column(scores, name) for name in grades} for arm, scores in arms.items()}
    summary = Summary()
    for arm, scores in arms.items():
        values = {name: bootstrap_mean(column.tolist(), seed) for name, column in columns[arm].items()}
        costs = {name: _column(scores, name) for name in COSTS if name in scores[0]}
        values |= {name: interval(cost.mean(), weights @ cost / n, n) for name, cost in costs.items()}
        if arm == METHOD:
            summary.metrics = values
            continue
        summary.arms[arm] = values
        for name in grades:
            gap = columns[METHOD][name] - columns[arm][name]
            difference = interval(gap.mean(), weights @ gap / n, n)
            summary.differences.setdefault(name, {})[arm] = difference
    summary.metrics |= _normalised(columns, grades, weights)
    summary.metrics |= _by_group(records, columns[METHOD], seed)
    summary.metrics |= _compression(records, weights)
    different = diversity([s["answer"] for s in arms[METHOD]], [record["gold"] for record in records])
    summary.metrics["distinct"] = Value(different.predicted / max(different.gold, 1e-9), n=n)
    summary.metrics["collapsed"] = Value(float(different.collapsed), n=n)
    return summary


def _column(scores: Sequence[Record], name: str) -> np.ndarray:
    return np.array([score[name] for score in scores], dtype=float)


def _normalised(
    columns: dict[str, dict[str, np.ndarray]], grades: Sequence[str], weights: np.ndarray
) -> dict[str, Value]:
    found: dict[str, Value] = {}
    start = TRAINED if TRAINED + FULL in columns else ""
    if not {start + FULL, start + NO_CONTEXT} <= columns.keys():
        return found
    for name in grades:
        ours, full, none = (columns[arm][name] for arm in (METHOD, start + FULL, start + NO_CONTEXT))
        possible = weights @ (full - none)
        if np.percentile(possible, 2.5) > 0:
            # A resample in which the full text brings nothing says nothing.
            resampled = weights @ (ours - none) / np.where(possible > 0, possible, np.nan)
            share = (ours - none).sum() / (full - none).sum()
            found[f"{name}_normalised"] = interval(share, resampled, len(ours))
    return found


def _by_group(records: Sequence[Record], columns: dict[str, np.ndarray], seed: int) -> dict[str, Value]:
    groups = np.array([record["group"] for record in records])
    names = list(dict.fromkeys(groups.tolist()))
    if len(names) < 2:
        return {}
    return {
        f"{name}/{group}": bootstrap_mean(column[groups == group].tolist(), seed)
        for group in names
        for name, column in columns.items()
    }


def _compression(records: Sequence[Record], weights: np.ndarray) -> dict[str, Value]:
    tokens, gists = (_column(records, name) for name in ("context_tokens", "gists"))
    n = len(records)
    if not gists.all():
        return {}
    return {
        "ratio": interval(tokens.sum() / gists.sum(), (weights @ tokens) / (weights @ gists), n),
        "ratio_mean": interval((tokens / gists).mean(), weights @ (tokens / gists) / n, n),
        "expanded": interval((tokens < gists).mean(), weights @ (tokens < gists) / n, n),
    }
