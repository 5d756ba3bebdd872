"""Tables of a page: lines in groups that stay together when they are sorted, columns that may be hidden."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvc.report.marks import Mark
from kvc.report.settings import say, shorten
from kvc.report.table import (
    Number,
    Row,
    SeedGroup,
    best_of,
    cell,
    excludes_zero,
    lower_is_better,
    rows_of,
)

TEXTS = {"method", "runs"}
"""Facts that are no numbers."""


@dataclass(frozen=True)
class Column:
    """One column.

    Attributes:
        name: Its heading.
        number: Whether it holds numbers.
        extra: Whether it is hidden until it is asked for.
        hint: What a pointer on the heading shows.
    """

    name: str
    number: bool = True
    extra: bool = False
    hint: str = ""


@dataclass(frozen=True)
class Cell:
    """One cell.

    Attributes:
        text: What it says.
        interval: The 95 % interval, in small below.
        order: What it is sorted by; None comes last.
        look: `best`, `better`, `worse` or nothing.
    """

    text: str
    interval: str = ""
    order: float | str | None = None
    look: str = ""


@dataclass(frozen=True)
class Line:
    """One line.

    Attributes:
        label: First column.
        cells: The others.
        mark: How the run is drawn in the plots.
        arm: Whether the line is an arm of the run above it.
    """

    label: str
    cells: tuple[Cell, ...]
    mark: Mark | None = None
    arm: bool = False


@dataclass(frozen=True)
class Table:
    """One table.

    Attributes:
        name: Names it on the page: letters only.
        columns: All but the first.
        groups: Lines; those of one group are sorted together.
        first: Heading of the first column.
    """

    name: str
    columns: tuple[Column, ...]
    groups: tuple[tuple[Line, ...], ...]
    first: str = "run"


def result_grid(results: dict[str, dict[str, Any]], chosen: Sequence[str], marks: Mapping[str, Mark]) -> Table:
    """Every metric of every run, its arms below it; the best of each column is marked.

    Args:
        results: Label of a run to its `result.json`.
        chosen: Metrics to show from the start; the others are there but hidden.
        marks: How each run is drawn.
    """
    return _metric_grid("results", rows_of(results), chosen, marks)


def difference_grid(results: dict[str, dict[str, Any]], chosen: Sequence[str], marks: Mapping[str, Mark]) -> Table:
    """Every paired difference: a line for each run, a column for each metric and arm."""
    values = {
        run: {
            (metric, arm): number
            for metric, arms in (result.get("differences") or {}).items()
            for arm, number in arms.items()
        }
        for run, result in results.items()
    }
    pairs = list(dict.fromkeys(pair for numbers in values.values() for pair in numbers))
    known = list(dict.fromkeys(metric for metric, _ in pairs))
    shown = [metric for metric in chosen if metric in known] or known[:1]
    pairs.sort(key=lambda pair: shown.index(pair[0]) if pair[0] in shown else len(shown))
    columns = tuple(
        Column(f"{metric} - {arm}", extra=metric not in shown, hint=_direction(metric)) for metric, arm in pairs
    )
    lines = [
        Line(run, tuple(_difference(numbers.get(pair), pair[0]) for pair in pairs), marks.get(run))
        for run, numbers in values.items()
        if numbers
    ]
    return Table("differences", columns, tuple((line,) for line in lines))


def seed_grid(groups: Sequence[SeedGroup], chosen: Sequence[str]) -> Table:
    """Means over the seeds of each group of runs, its arms below it."""
    rows = []
    for group in groups:
        name = f"{group.runs[0]} and {len(group.runs) - 1} more"
        facts = {"seeds": ", ".join(map(str, group.seeds)), "runs": ", ".join(group.runs)}
        rows += [Row(name, arm, values, {} if arm else facts) for arm, values in group.metrics.items()]
    return _metric_grid("seeds", rows, chosen, {})


def settings_grid(table: dict[str, dict[str, Any]], runs: Sequence[str], marks: Mapping[str, Mark]) -> Table:
    """Settings that differ: a line for each run, or for each setting where there are more of these.

    Args:
        table: Key to run to value.
        runs: Labels of the runs.
        marks: How each run is drawn.
    """
    names = shorten(list(table))
    if len(table) <= max(len(runs), 4):
        columns = tuple(Column(names[key], number=False, hint=key) for key in table)
        lines = [Line(run, tuple(_setting(table[key][run]) for key in table), marks.get(run)) for run in runs]
        return Table("settings", columns, tuple((line,) for line in lines))
    columns = tuple(Column(run, number=False) for run in runs)
    lines = [Line(key, tuple(_setting(values[run]) for run in runs)) for key, values in table.items()]
    return Table("settings", columns, tuple((line,) for line in lines), first="setting")


def _metric_grid(name: str, rows: Sequence[Row], chosen: Sequence[str], marks: Mapping[str, Mark]) -> Table:
    facts = list(dict.fromkeys(fact for row in rows for fact in row.facts))
    every = list(dict.fromkeys(metric for row in rows for metric in row.values))
    first, rest = [metric for metric in chosen if metric in every], [m for m in every if m not in chosen]
    runs = [row for row in rows if not row.arm]
    # Among several runs the best of them is sought, beside one run the best of it and its arms.
    best = {metric: best_of(metric, runs if len(runs) > 1 else rows) for metric in every}
    columns = [Column(metric, hint=_direction(metric)) for metric in first]
    columns += [Column(fact, number=fact not in TEXTS) for fact in facts]
    columns += [Column(metric, extra=True, hint=_direction(metric)) for metric in rest]
    groups: dict[str, list[Line]] = {}
    for row in rows:
        top = {} if row.arm and len(runs) > 1 else best
        cells = [_number(row.values.get(metric), top.get(metric)) for metric in first]
        cells += [_fact(row.facts.get(fact, "")) for fact in facts]
        cells += [_number(row.values.get(metric), top.get(metric)) for metric in rest]
        mark = None if row.arm else marks.get(row.run)
        groups.setdefault(row.run, []).append(Line(row.arm or row.run, tuple(cells), mark, bool(row.arm)))
    return Table(name, tuple(columns), tuple(map(tuple, groups.values())))


def _direction(metric: str) -> str:
    return f"{'lower' if lower_is_better(metric) else 'higher'} is better"


def _number(number: Number | None, best: float | None) -> Cell:
    if not number:
        return Cell("-")
    text, _, interval = cell(number, separator="|").partition("|")
    return Cell(text, interval, number["value"], "best" if best is not None and number["value"] == best else "")


def _difference(number: Number | None, metric: str) -> Cell:
    if not number:
        return Cell("-")
    text, _, interval = cell(number, signed=True, separator="|").partition("|")
    better = (number["value"] < 0) == lower_is_better(metric)
    look = "" if not excludes_zero(number) else "better" if better else "worse"
    return Cell(text, interval, number["value"], look)


def _fact(text: str) -> Cell:
    """A fact sorts as a number where it is one: 16.6k is 16600."""
    factor = {"k": 1e3, "M": 1e6, "G": 1e9}.get(text[-1:], 1.0)
    try:
        return Cell(text, order=float(text.rstrip("kMG").replace(",", "")) * factor)
    except ValueError:
        return Cell(text, order=text or None)


def _setting(value: Any) -> Cell:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return Cell(say(value), order=value if number else say(value))
