"""Scores against average ratios, of every way to choose a budget."""

from collections.abc import Sequence

import numpy as np
import torch

from kvc.core.module import Record
from kvc.core.results import Summary, Value, bootstrap_mean, bootstrap_weights, interval
from kvc.methods.squad.adaptive import calibrate, cascade, smallest_sufficient

CASCADE, ORACLE = "cascade", "oracle"


def summarize(records: Sequence[Record], seed: int, margin: float, loss: float) -> Summary:
    """The network's choices as the method; every fixed budget, the cascade and the oracle as arms.

    `f1` and `em`; `ratio` is all tokens over all rows of KV that stand for contexts; `rows` their mean; `rows_read`
    also counts what the cascade tried before; `kept_full` is the share of contexts that stay as they are.

    Args:
        records: With `tries` (budget to `em`, `f1`, `rows`, `confidence`), `chosen`, `context_tokens` and `fold`.
        seed: Of the bootstrap; all arms are resampled alike.
        margin: F1 that the oracle may lose.
        loss: Mean F1 that the cascade may lose.
    """
    names = list(records[0]["tries"])
    table = {
        key: torch.tensor([[float(record["tries"][name][key]) for name in names] for record in records])
        for key in ("em", "f1", "rows", "confidence")
    }
    tokens = np.array([record["context_tokens"] for record in records], dtype=float)
    choices = {"method": torch.tensor([names.index(record["chosen"]) for record in records])}
    choices |= {name: torch.full((len(records),), number) for number, name in enumerate(names)}
    choices[CASCADE] = _cascaded(table, torch.tensor([record["fold"] for record in records]), loss)
    choices[ORACLE] = smallest_sufficient(table["f1"], margin)
    weights = bootstrap_weights(len(records), seed)
    summary = Summary()
    measured = {arm: _columns(table, chosen, arm == CASCADE) for arm, chosen in choices.items()}
    for arm, columns in measured.items():
        values = _values(columns, tokens, weights, seed)
        if names[-1] == "full":
            kept = (choices[arm] == len(names) - 1).float().tolist()
            values["kept_full"] = bootstrap_mean(kept, seed)
        if arm == "method":
            summary.metrics = values
            continue
        summary.arms[arm] = values
        for key in ("f1", "em"):
            gap = measured["method"][key] - columns[key]
            found = interval(gap.mean(), weights @ gap / len(gap), len(gap))
            summary.differences.setdefault(key, {})[arm] = found
    return summary


def _cascaded(table: dict[str, torch.Tensor], fold: torch.Tensor, loss: float) -> torch.Tensor:
    """Choices of the cascade, each with the threshold that the other half of the contexts calls for."""
    chosen = torch.empty(len(fold), dtype=torch.int64)
    for part in (0, 1):
        mine, other = fold == part, fold != part
        # All contexts may be in one half where there are few.
        taken = other if bool(other.any()) else mine
        threshold = calibrate(table["confidence"][taken], table["f1"][taken], table["rows"][taken], loss)
        chosen[mine] = cascade(table["confidence"][mine], threshold)
    return chosen


def _columns(table: dict[str, torch.Tensor], chosen: torch.Tensor, tried: bool) -> dict[str, np.ndarray]:
    columns = {key: table[key].gather(1, chosen[:, None])[:, 0].double().numpy() for key in ("f1", "em", "rows")}
    if tried:
        before = torch.arange(table["rows"].shape[1]) <= chosen[:, None]
        columns["rows_read"] = (table["rows"] * before).sum(1).double().numpy()
    return columns


def _values(columns: dict[str, np.ndarray], tokens: np.ndarray, weights: np.ndarray, seed: int) -> dict[str, Value]:
    n = len(tokens)
    values = {key: bootstrap_mean(columns[key].tolist(), seed) for key in ("f1", "em")}
    values |= {
        key: interval(columns[key].mean(), weights @ columns[key] / n, n)
        for key in ("rows", "rows_read")
        if key in columns
    }
    held = weights @ columns["rows"]
    if columns["rows"].sum():
        resampled = (weights @ tokens) / np.where(held > 0, held, np.nan)
        values["ratio"] = interval(tokens.sum() / columns["rows"].sum(), resampled, n)
    return values
