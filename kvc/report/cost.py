"""What quality is set against: bytes of KV, tokens kept, size or time, and the points that this gives."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeGuard

from kvc.errors import UserError
from kvc.report.table import Number, lower_is_better

COST_WORDS = ("kv_bytes", "kept")
"""Metrics that are costs, by a part of their name, in the order in which they are preferred."""
FACTS = {
    "trainable_parameters": ("sizes", "trainable parameters"),
    "fit_seconds": ("timing", "training time (s)"),
    "evaluation_seconds": ("timing", "evaluation time (s)"),
    "parameters": ("sizes", "parameters"),
}
"""Costs that stand beside the metrics in `result.json`: where, and what an axis calls them."""


@dataclass(frozen=True)
class Point:
    """A method or an arm in a plot of quality against cost.

    Attributes:
        run: Label of the run.
        arm: Name of the arm; empty for the method itself.
        cost: Number on the horizontal axis; None where the arm has none.
        quality: Number on the vertical axis.
    """

    run: str
    arm: str
    cost: Number | None
    quality: Number

    @property
    def name(self) -> str:
        """Run, and arm if it is one."""
        return f"{self.run}, {self.arm}" if self.arm else self.run


def is_cost(metric: str) -> bool:
    """Whether a metric says what something needs, not what it reaches."""
    return any(word in metric for word in COST_WORDS)


def choose_cost(results: dict[str, dict[str, Any]], quality: str, asked: str | None = None) -> str:
    """The horizontal axis for one metric: what was asked, else bytes of KV, else tokens kept, else size or time.

    `exact_match/passages` is set against `kv_bytes/passages` where there is one: `asked` may be `kv_bytes`.

    Args:
        results: Label of a run to its `result.json`.
        quality: Metric on the vertical axis.
        asked: Metric, its part before the `/`, or one of `FACTS`.

    Raises:
        UserError: If no run has what was asked.
    """
    group = quality.partition("/")[2]
    names = _metrics(results)
    if asked is not None:
        for name in (f"{asked}/{group}", asked):
            if name in names or any(fact(result, name) for result in results.values()):
                return name
        if any(name.startswith(f"{asked}/") for name in names):
            return f"{asked}/{group}"  # other metrics have it, this one does not: its plot says so
        costs = [name for name in names if is_cost(name)] or names
        raise UserError(f"--x {asked}: no run has it; there are {', '.join([*sorted(costs), *FACTS])}")
    for word in COST_WORDS:
        found = [name for name in names if word in name and name != quality]
        fitting = [name for name in found if name.partition("/")[2] in ({group, ""} if group else {""})] or (
            [] if group else found
        )
        if fitting:
            # Of the same task first, then what most runs have.
            own = [name for name in fitting if name.partition("/")[2] == group] or fitting
            return max(own, key=lambda name: sum(name in result["metrics"] for result in results.values()))
    # A size that all runs share says nothing.
    for name in ("trainable_parameters", "fit_seconds"):
        values = [number["value"] for result in results.values() if (number := fact(result, name))]
        if len(set(values)) > 1:
            return name
    return "trainable_parameters"


def points(results: dict[str, dict[str, Any]], quality: str, cost: str) -> list[Point]:
    """Every method and arm that has the quality, and each arm only once where runs share it.

    Args:
        results: Label of a run to its `result.json`.
        quality: Metric on the vertical axis.
        cost: Metric or fact on the horizontal axis.
    """
    found: list[Point] = []
    seen = set()
    for run, result in results.items():
        if _finite(number := result["metrics"].get(quality)):
            found.append(Point(run, "", _cost(result["metrics"], cost) or fact(result, cost), number))
        for arm, values in result.get("arms", {}).items():
            if not _finite(number := values.get(quality)):
                continue
            place = _cost(values, cost)
            key = (arm, round(number["value"], 9), place and place["value"])
            if key not in seen:
                seen.add(key)
                found.append(Point(run, arm, place, number))
    return found


def fact(result: dict[str, Any], name: str) -> Number | None:
    """A size or a time of a run; None where it has none (an evaluation is not trained)."""
    part = (result.get(FACTS[name][0]) if name in FACTS else None) or {}
    value = part.get(name)
    return {"value": value} if isinstance(value, int | float) and value > 0 else None


def axis_label(cost: str) -> str:
    """What the horizontal axis says: the quantity and its unit."""
    if cost in FACTS:
        return f"{FACTS[cost][1]}, less is better"
    unit = " (bytes)" if "bytes" in cost else ""
    return f"{cost}{unit}, less is better"


def quality_label(metric: str) -> str:
    """What the vertical axis says: the metric and its direction."""
    return f"{metric}, {'lower' if lower_is_better(metric) else 'higher'} is better"


def qualities(metrics: Iterable[str]) -> list[str]:
    """The metrics that belong on a vertical axis."""
    return [metric for metric in metrics if not is_cost(metric)]


def _metrics(results: dict[str, dict[str, Any]]) -> list[str]:
    """Names of the metrics of all methods, then those that only arms have."""
    own = [name for result in results.values() for name in result["metrics"]]
    arms = [name for result in results.values() for arm in result.get("arms", {}).values() for name in arm]
    return list(dict.fromkeys([*own, *arms]))


def _cost(values: dict[str, Number], cost: str) -> Number | None:
    number = values.get(cost)
    return number if _finite(number) else None


def _finite(number: Number | None) -> TypeGuard[Number]:
    return number is not None and "value" in number and math.isfinite(number["value"])
