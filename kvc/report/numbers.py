"""Every number of a comparison for other programs: CSV (one number a line) and JSON."""

import csv
import io
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kvc.report.table import mismatches, seed_groups

HEADER = ["run", "path", "method", "arm", "seed", "kind", "metric", "value", "low", "high", "n"]


def as_csv(results: dict[str, dict[str, Any]], labels: dict[str, Path]) -> str:
    """Every number on a line of its own.

    Args:
        results: Label of a run to its `result.json`.
        labels: Label of a run to its folder.
    """
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(HEADER)

    def add(start: list[Any], arm: str, seed: Any, kind: str, values: dict[str, Any]) -> None:
        for name, number in values.items():
            table.writerow([*start, arm, seed, kind, name, *(number.get(k) for k in ("value", "low", "high", "n"))])

    for run, result in results.items():
        start, seed = [run, str(labels[run]), result.get("method")], result.get("seed")
        add(start, "", seed, "metric", result["metrics"])
        for key, part in (("trainable_parameters", "sizes"), ("fit_seconds", "timing")):
            if key in result.get(part, {}):
                add(start, "", seed, part, {key: {"value": result[part][key]}})
        for arm, values in result.get("arms", {}).items():
            add(start, arm, seed, "metric", values)
        for metric, arms in result.get("differences", {}).items():
            for arm, number in arms.items():
                add(start, arm, seed, "difference", {metric: number})
    for group in seed_groups(results):
        start, seeds = [" ".join(group.runs), "", results[group.runs[0]].get("method")], " ".join(map(str, group.seeds))
        for arm, values in group.metrics.items():
            add(start, arm, seeds, "metric, mean over seeds", values)
        for metric, arms in group.differences.items():
            for arm, number in arms.items():
                add(start, arm, seeds, "difference, mean over seeds", {metric: number})
    return text.getvalue()


def as_json(results: dict[str, dict[str, Any]], labels: dict[str, Path]) -> dict[str, Any]:
    """Everything that was measured, the means over seeds, and what does not compare.

    Args:
        results: Label of a run to its `result.json`.
        labels: Label of a run to its folder.
    """
    measured = ["samples", "headline", "metrics", "arms", "differences"]
    keys = ["method", "seed", "identity", *measured, "sizes", "timing", "base_model", "data"]
    return {
        "schema": 1,
        "runs": [
            {"run": run, "path": str(labels[run]), **{k: result[k] for k in keys if k in result}}
            for run, result in results.items()
        ],
        "seeds": [asdict(group) for group in seed_groups(results)],
        "warnings": mismatches(results),
    }
