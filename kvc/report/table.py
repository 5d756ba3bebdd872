"""Finished runs side by side: what was measured, paired differences, and means over seeds."""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

Number = dict[str, Any]
"""One number of `result.json`: `value` and, where known, `low`, `high` and `n`."""

KEY_METRICS = 5
LOWER_IS_BETTER = ("loss", "error", "seconds", "perplexity", "bytes", "kept")


@dataclass(frozen=True)
class Row:
    """One line of a table: a method, or an arm measured beside it.

    Attributes:
        run: Label of the run.
        arm: Name of the arm; empty for the method itself.
        values: Metric to number.
        facts: Further columns by heading.
    """

    run: str
    arm: str
    values: dict[str, Number]
    facts: dict[str, str]

    @property
    def label(self) -> str:
        """First column: the run, and its arms indented below."""
        return f"  {self.arm}" if self.arm else self.run


@dataclass(frozen=True)
class SeedGroup:
    """Runs that are the same except for the seed.

    Attributes:
        runs: Their labels.
        seeds: Their seeds.
        metrics: Arm ("" is the method) to metric to its mean over seeds with a t-interval; `n` counts seeds.
        differences: Metric to arm to the mean paired difference with a t-interval.
    """

    runs: list[str]
    seeds: list[Any]
    metrics: dict[str, dict[str, Number]]
    differences: dict[str, dict[str, Number]]


def lower_is_better(metric: str) -> bool:
    """Whether the smallest value of this metric is the best, by its name."""
    words = metric.lower().replace("/", "_").replace("-", "_").split("_")
    return any(name in metric.lower() for name in LOWER_IS_BETTER) or "ece" in words


def figure(value: float | None) -> str:
    """A number in a few digits."""
    if value is None or not math.isfinite(value):
        return "-"
    if abs(value) < 1e-9:  # what differences of equal numbers leave
        return "0.000"
    if abs(value) < 0.001:
        return f"{value:.1e}"
    return f"{value:.3f}" if abs(value) < 100 else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.1f}"


def cell(number: Number | None, signed: bool = False, separator: str = " ") -> str:
    """`0.873 [0.851, 0.894]`; a difference has a sign, and a star where its interval excludes 0."""
    if not number:
        return "-"
    text = figure(number["value"])
    if signed and number["value"] > 1e-9:
        text = f"+{text}"
    low, high = number.get("low"), number.get("high")
    if low is None or high is None:
        return text
    star = " *" if signed and excludes_zero(number) else ""
    return f"{text}{separator}[{figure(low)}, {figure(high)}]{star}"


def excludes_zero(number: Number) -> bool:
    """Whether the interval lies on one side of 0."""
    low, high = number.get("low"), number.get("high")
    return low is not None and high is not None and (low > 0 or high < 0)


def rows_of(results: dict[str, dict[str, Any]]) -> list[Row]:
    """One row for each method and each of its arms.

    Args:
        results: Label of a run to its `result.json`.
    """
    rows = []
    for run, result in results.items():
        facts = {
            "method": str(result.get("method", "")).rsplit(".", 1)[-1],
            "n": _count(result["metrics"], result.get("samples")),
            "seed": str(result.get("seed")),
            "trained": _short(result.get("sizes", {}).get("trainable_parameters")),
            # An evaluation of a trained run spends no time on training.
            "fit s": _short(result.get("timing", {}).get("fit_seconds") or None),
        }
        rows.append(Row(run, "", result["metrics"], facts))
        for arm, values in result.get("arms", {}).items():
            rows.append(Row(run, arm, values, {"n": _count(values, None)}))
    return rows


def difference_rows(differences: dict[str, dict[str, dict[str, Number]]]) -> list[Row]:
    """One row for each run and arm, from `differences[run][metric][arm]`."""
    rows = []
    for run, metrics in differences.items():
        for arm in dict.fromkeys(arm for arms in metrics.values() for arm in arms):
            values = {metric: arms[arm] for metric, arms in metrics.items() if arm in arms}
            rows.append(Row(f"{run} - {arm}", "", values, {"n": _count(values, None)}))
    return rows


def key_metrics(results: Iterable[dict[str, Any]]) -> list[str]:
    """The metrics to show: each result's `headline`, else the first few of all."""
    results = list(results)
    headline = dict.fromkeys(name for result in results for name in result.get("headline") or [])
    if headline:
        return list(headline)
    return list(dict.fromkeys(name for result in results for name in result["metrics"]))[:KEY_METRICS]


def seed_groups(results: dict[str, dict[str, Any]]) -> list[SeedGroup]:
    """Group runs that differ in nothing but the seed, and average each group of two or more seeds."""
    summaries = []
    for repeated in _by_seed(results):
        # A repeated seed is the same run again and adds no information.
        members = {seed: runs[0] for seed, runs in repeated.items()}
        if len(members) < 2:
            continue
        parts = [results[run] for run in members.values()]
        arms = dict.fromkeys(arm for part in parts for arm in part.get("arms", {}))
        by_arm = {"": [part["metrics"] for part in parts]}
        by_arm |= {arm: [part.get("arms", {}).get(arm, {}) for part in parts] for arm in arms}
        differences = [part.get("differences", {}) for part in parts]
        metrics = dict.fromkeys(metric for part in differences for metric in part)
        summaries.append(
            SeedGroup(
                runs=list(members.values()),
                seeds=list(members),
                metrics={arm: _means(values) for arm, values in by_arm.items()},
                differences={metric: _means([part.get(metric, {}) for part in differences]) for metric in metrics},
            )
        )
    return summaries


def _by_seed(results: dict[str, dict[str, Any]]) -> list[dict[Any, list[str]]]:
    """Groups of runs that are the same but for the seed: seed to runs."""
    groups: dict[str, dict[Any, list[str]]] = {}
    for run, result in results.items():
        groups.setdefault(_identity_without_seed(result), {}).setdefault(result.get("seed"), []).append(run)
    return list(groups.values())


def _identity_without_seed(result: dict[str, Any]) -> str:
    from kvc.runs import identity_of

    identity = identity_of(result.get("config", {}))
    kept = {
        key: value
        for key, value in identity.items()
        # Each seed has its own checkpoint, so an evaluation's checkpoint says nothing but the seed.
        if key not in {"seed_everything", "checkpoint"} and not key.endswith(".init_args.seed")
    }
    return json.dumps([result.get("method"), result.get("base_model"), kept], sort_keys=True, default=str)


def _means(values: Sequence[dict[str, Number]]) -> dict[str, Number]:
    """Mean over seeds, for the names that every seed has."""
    names = [name for name in values[0] if all(name in other for other in values)]
    return {name: mean_over_seeds([value[name]["value"] for value in values]) for name in names}


def mean_over_seeds(values: Sequence[float]) -> Number:
    """Mean with its 95 % t-interval; `n` is the number of seeds, at least 2.

    Equal values have no interval: a few seeds that agree do not show that there is no spread.
    """
    import numpy as np
    from scipy.special import stdtrit

    data = np.asarray(values, dtype=float)
    if np.allclose(data, data[0], rtol=1e-12, atol=1e-12):
        return {"value": float(data[0]), "n": len(data)}
    half = float(stdtrit(len(data) - 1, 0.975) * data.std(ddof=1) / math.sqrt(len(data)))
    mean = float(data.mean())
    return {"value": mean, "low": mean - half, "high": mean + half, "n": len(data)}


def mismatches(results: dict[str, dict[str, Any]]) -> list[str]:
    """One line for everything that makes the runs hard to compare."""
    warnings = []
    for what, key in (("data", "data"), ("base models", "base_model")):
        hashes = {(result.get(key) or {}).get("hash") for result in results.values()}
        if len(hashes) > 1:
            warnings.append(f"the runs used different {what} ({len(hashes)} hashes): their numbers do not compare")
    for group in _by_seed(results):
        for seed, runs in group.items():
            if len(group) > 1 and len(runs) > 1:
                same = f"{', '.join(runs)} have the same settings and seed {seed}"
                warnings.append(f"{same}: only {runs[0]} counts in the mean over seeds")
    return warnings


def show(results: dict[str, dict[str, Any]], metrics: Sequence[str] | None, console: "Console") -> None:
    """Print the tables.

    Args:
        results: Label of a run to its `result.json`.
        metrics: Metrics to show; the key metrics if None.
        console: Where to; columns that do not fit its width go into a further table.
    """
    chosen = list(metrics or key_metrics(results.values()))
    print_rows(console, "Metrics (95 % interval; best bold)", rows_of(results), chosen)
    differences = {run: result.get("differences", {}) for run, result in results.items()}
    _print_differences(
        console, "Paired differences, method - arm (* interval excludes 0)", differences, metrics, chosen
    )
    groups = seed_groups(results)
    rows, paired = [], {}
    for group in groups:
        name = f"{group.runs[0]} and {len(group.runs) - 1} more"
        facts = {"seeds": ", ".join(map(str, group.seeds))}
        rows += [Row(name, arm, values, {} if arm else facts) for arm, values in group.metrics.items()]
        paired[name] = group.differences
    if rows:
        print_rows(console, "Mean over seeds (t-interval, n = seeds)", rows, chosen)
        title = "Paired differences, mean over seeds (t-interval, n = seeds)"
        _print_differences(console, title, paired, metrics, chosen)
    for warning in mismatches(results):
        console.print(f"warning: {warning}", style="yellow", markup=False, highlight=False, soft_wrap=True)


def _print_differences(
    console: "Console",
    title: str,
    differences: dict[str, dict[str, dict[str, Number]]],
    asked: Sequence[str] | None,
    chosen: list[str],
) -> None:
    rows = difference_rows(differences)
    known = list(dict.fromkeys(metric for row in rows for metric in row.values))
    wanted = [metric for metric in chosen if metric in known]
    if not wanted and not asked:
        wanted = known[:KEY_METRICS]
    if wanted:
        print_rows(console, title, [row for row in rows if row.values.keys() & set(wanted)], wanted, signed=True)


def print_rows(console: "Console", title: str, rows: Sequence[Row], metrics: list[str], signed: bool = False) -> None:
    """Print one table, or several where the columns do not fit side by side."""
    from rich.table import Table

    facts = list(dict.fromkeys(name for row in rows for name in row.facts))
    best = {} if signed else {metric: best_of(metric, rows) for metric in metrics}

    def table(columns: Sequence[str], separator: str) -> Table:
        result = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0))
        result.add_column("run", overflow="fold")
        for name in columns:
            result.add_column(name.replace("/", "/\n"), justify="left" if name == "method" else "right")
        for row in rows:
            texts = [_styled(row, name, signed, separator, best) for name in columns]
            result.add_row(row.label, *texts, style=None if not row.arm else "dim")
        return result

    for columns, separator in _pages([*facts, *metrics], lambda *page: _width(table(*page), console), console.width):
        console.print(table(columns, separator))
        console.print()


def _pages(columns: list[str], width: Callable[[list[str], str], int], limit: int) -> Iterator[tuple[list[str], str]]:
    """Columns of each table: all in one if they fit, else intervals below values, else split."""
    if width(columns, " ") <= limit:
        yield columns, " "
        return
    page: list[str] = []
    for column in columns:
        if page and width([*page, column], "\n") > limit:
            yield page, "\n"
            page = []
        page = [*page, column]
    yield page, "\n"


def _width(table: Any, console: "Console") -> int:
    from rich.measure import Measurement

    # Measured on a wide page: on a narrow one the answer would be the page.
    return Measurement.get(console, console.options.update(max_width=10_000), table).maximum


def _styled(row: Row, name: str, signed: bool, separator: str, best: dict[str, float | None]) -> Any:
    from rich.text import Text

    if name in row.facts:
        return Text(row.facts[name])
    number = row.values.get(name)
    top = number is not None and best.get(name) is not None and number["value"] == best[name]
    return Text(cell(number, signed, separator), style="bold not dim" if top else "")


def best_of(metric: str, rows: Sequence[Row]) -> float | None:
    """The best value of a metric; None where there is nothing to compare."""
    values = [row.values[metric]["value"] for row in rows if metric in row.values]
    if len(set(values)) < 2:
        return None
    return min(values) if lower_is_better(metric) else max(values)


def _count(values: dict[str, Number], otherwise: Any) -> str:
    """Units behind a row: those of its first metric that says so."""
    counts = [number["n"] for number in values.values() if number.get("n") is not None]
    return str(counts[0] if counts else "" if otherwise is None else otherwise)


def _short(value: float | None) -> str:
    """`1.15M`, `12k`, `15.1`."""
    if value is None:
        return ""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e4)):
        if value >= size:
            return f"{value / (1e3 if unit == 'k' else size):.3g}{unit}"
    return f"{value:.1f}" if isinstance(value, float) else str(value)
