"""How well the end of each trace is predicted, and how many rows it took."""

from collections.abc import Sequence

import numpy as np

from kvc.core.masks import Kind
from kvc.core.module import Record
from kvc.core.results import Summary, Value, bootstrap_mean, bootstrap_weights, interval

METHOD = "method"
UNTRAINED = "untrained"
"""The method before training: what the memory is worth when it has learned nothing."""
COSTS = ("kv_tokens_peak", "kv_tokens_final", "kv_bytes_peak", "kv_bytes_final", "kv_share")
SUMS = {"token_accuracy": ("right", "tokens"), "nll": ("nll", "tokens")}


def summarize(records: Sequence[Record], seed: int) -> Summary:
    """Metrics of the method, of its arms on the same traces, and their paired differences.

    Args:
        records: With `arms`, name to `exact`, `right`, `tokens`, `nll` and rows of KV; the first is `METHOD`.
        seed: Seed of the bootstrap; all arms are resampled alike.
    """
    summary = Summary()
    weights = bootstrap_weights(len(records), seed)
    ours: dict[str, tuple[Value, np.ndarray]] = {}
    for arm in records[0]["arms"]:
        measured = _measure([record["arms"][arm] for record in records], weights, seed)
        values = {name: value for name, (value, _) in measured.items()}
        if arm == METHOD:
            ours, summary.metrics = measured, values
            continue
        summary.arms[arm] = values
        for name in ("exact", *SUMS):
            (mine, mine_resampled), (theirs, theirs_resampled) = ours[name], measured[name]
            difference = interval(mine.value - theirs.value, mine_resampled - theirs_resampled, len(records))
            summary.differences.setdefault(name, {})[arm] = difference
    return summary


def _measure(scores: Sequence[Record], weights: np.ndarray, seed: int) -> dict[str, tuple[Value, np.ndarray]]:
    columns = {name: np.array([score[name] for score in scores], dtype=float) for name in scores[0]}
    n = len(scores)
    measured = {"exact": (bootstrap_mean(columns["exact"].tolist(), seed), weights @ columns["exact"] / n)}
    for name, (top, bottom) in SUMS.items():
        resampled = (weights @ columns[top]) / np.maximum(weights @ columns[bottom], 1)
        measured[name] = (interval(columns[top].sum() / max(columns[bottom].sum(), 1), resampled, n), resampled)
    for name in COSTS:
        measured[name] = (bootstrap_mean(columns[name].tolist(), seed), weights @ columns[name] / n)
    return measured


def rows_held(kind: Kind, prompt: int, segments: Sequence[int], slots: int, row_bytes: float = 0.0) -> dict[str, float]:
    """Rows of KV per layer and head, and their bytes, while a trace is read segment by segment.

    Args:
        kind: How segments are compressed.
        prompt: Tokens that stay.
        segments: Tokens of each segment; the last one is not compressed.
        slots: Memory tokens of a run, n.
        row_bytes: Bytes of one row in all layers and heads.

    Returns:
        `kv_tokens_peak`, `kv_tokens_final`, the same in `kv_bytes_*`, and `kv_share`: rows that stand for the finished
        segments, divided by their tokens.
    """
    steps, finished = len(segments) - 1, sum(segments[:-1])
    if kind in {"full", "pos_control"}:
        memory, run = [sum(segments[:step]) for step in range(steps + 1)], 0
    elif kind in {"no_context", "neg_control"}:
        memory, run = [0] * (steps + 1), 0
    else:
        memory, run = (
            [slots * (step if kind.startswith("concat") else min(step, 1)) for step in range(steps + 1)],
            slots,
        )
    during = [prompt + held + size + run for held, size in zip(memory, segments)]
    final = float(prompt + memory[-1] + segments[-1])
    peak = float(max([*during[:-1], final]))
    return {
        "kv_tokens_peak": peak,
        "kv_tokens_final": final,
        "kv_bytes_peak": peak * row_bytes,
        "kv_bytes_final": final * row_bytes,
        "kv_share": memory[-1] / max(finished, 1),
    }
