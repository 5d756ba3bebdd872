from typing import Any

import pytest

from kvc.errors import UserError
from kvc.report.cost import axis_label, choose_cost, points, qualities, quality_label
from kvc.report.table import lower_is_better


def result(
    metrics: dict[str, float], arms: dict[str, dict[str, float]] | None = None, **facts: float
) -> dict[str, Any]:
    numbers = {name: {"value": value} for name, value in metrics.items()}
    below = {arm: {name: {"value": v} for name, v in values.items()} for arm, values in (arms or {}).items()}
    timing = {key: value for key, value in facts.items() if key.endswith("seconds")}
    return {
        "metrics": numbers,
        "arms": below,
        "timing": timing,
        "sizes": {k: v for k, v in facts.items() if k not in timing},
    }


@pytest.mark.parametrize(
    ("metrics", "quality", "cost"),
    [
        (["f1", "kept", "kv_bytes_peak"], "f1", "kv_bytes_peak"),
        (["f1", "kept"], "f1", "kept"),
        (["em/a", "em/b", "kept/a", "kv_bytes/b"], "em/b", "kv_bytes/b"),
        (["em/a", "em/b", "kept/a", "kv_bytes/b"], "em/a", "kept/a"),  # bytes of another task say nothing
        (["em/a", "kv_bytes"], "em/a", "kv_bytes"),
        (["em", "kv_bytes/a"], "em", "kv_bytes/a"),
    ],
)
def test_the_cost_fits_the_metric(metrics: list[str], quality: str, cost: str) -> None:
    assert choose_cost({"r": result(dict.fromkeys(metrics, 1.0))}, quality) == cost


def test_without_bytes_size_counts_and_without_sizes_time() -> None:
    sizes = {"a": result({"f1": 1}, trainable_parameters=5), "b": result({"f1": 1}, trainable_parameters=6)}
    assert choose_cost(sizes, "f1") == "trainable_parameters"
    times = {run: result({"f1": 1}, trainable_parameters=5, fit_seconds=i + 1) for i, run in enumerate("ab")}
    assert choose_cost(times, "f1") == "fit_seconds"
    assert choose_cost({"a": result({"f1": 1})}, "f1") == "trainable_parameters"


def test_what_most_runs_have_is_preferred() -> None:
    runs = {"a": result({"f1": 1, "kv_bytes_mean": 1, "kv_bytes_peak": 1}), "b": result({"f1": 1, "kv_bytes_peak": 1})}
    assert choose_cost(runs, "f1") == "kv_bytes_peak"


def test_asked_costs() -> None:
    runs = {"a": result({"em/x": 1, "em/y": 1, "kv_bytes/x": 1, "kept/x": 1}, evaluation_seconds=3)}
    assert choose_cost(runs, "em/x", "kept") == "kept/x"
    assert choose_cost(runs, "em/y", "kept") == "kept/y"
    assert choose_cost(runs, "em/x", "evaluation_seconds") == "evaluation_seconds"
    with pytest.raises(
        UserError, match="--x memory: no run has it; there are kept/x, kv_bytes/x, trainable_parameters"
    ):
        choose_cost(runs, "em/x", "memory")


def test_points_of_methods_and_arms() -> None:
    arms = {"full": {"f1": 0.9, "kept": 100}, "none": {"f1": 0.1}, "other": {"em": 1}}
    runs = {"a": result({"f1": 0.5, "kept": 10}, arms), "b": result({"f1": 0.6}, arms), "c": result({"em": 1})}
    found = points(runs, "f1", "kept")
    assert [(p.name, p.cost and p.cost["value"]) for p in found] == [
        ("a", 10),
        ("a, full", 100),
        ("a, none", None),
        ("b", None),  # its arms are those of a
    ]
    timed = points({"a": result({"f1": 1}, fit_seconds=7), "b": result({"f1": float("nan")})}, "f1", "fit_seconds")
    assert [(p.name, p.cost) for p in timed] == [("a", {"value": 7})]


def test_labels_and_directions() -> None:
    assert qualities(["f1", "kept/a", "kv_bytes_peak", "loss"]) == ["f1", "loss"]
    assert axis_label("kv_bytes_peak") == "kv_bytes_peak (bytes), less is better"
    assert axis_label("fit_seconds") == "training time (s), less is better"
    assert quality_label("val/loss") == "val/loss, lower is better"
    assert lower_is_better("kv_bytes/peak")
    assert lower_is_better("kept/passages")
