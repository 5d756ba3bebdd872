"""Tables of a page: lines in groups that stay together when they are sorted, columns that may be hidden."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from kvc.report.marks import Mark
from kvc.report.settings import say, shorten
from kvc.report.table import (
    Number,
    Row,
    SeedGroup,
    best_of,
    difference_rows,
    excludes_zero,
    figure,
    lower_is_better,
    rows_of,
)


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
    return _metric_grid("results", rows_of(results), chosen, marks, signed=False)


def difference_grid(results: dict[str, dict[str, Any]], chosen: Sequence[str], marks: Mapping[str, Mark]) -> Table:
    """Every paired difference, method - arm."""
    differences = {run: result.get("differences") or {} for run, result in results.items()}
    rows = difference_rows(differences)
    return _metric_grid("differences", rows, _known(chosen, rows), marks, signed=True)


def seed_grid(groups: Sequence[SeedGroup], chosen: Sequence[str], marks: Mapping[str, Mark]) -> Table:
    """Means over the seeds of each group of runs, its arms below it."""
    rows = []
    for group in groups:
        name, facts = group.runs[0], {"seeds": ", ".join(map(str, group.seeds))}
        rows += [Row(name, arm, values, {} if arm else facts) for arm, values in group.metrics.items()]
    return _metric_grid("seeds", rows, chosen, marks, signed=False)


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


def _known(chosen: Sequence[str], rows: Sequence[Row]) -> list[str]:
    """The chosen metrics that the rows have; the first of theirs where they have none."""
    metrics = list(dict.fromkeys(metric for row in rows for metric in row.values))
    return [metric for metric in chosen if metric in metrics] or metrics[:1]


def _metric_grid(
    name: str, rows: Sequence[Row], chosen: Sequence[str], marks: Mapping[str, Mark], signed: bool
) -> Table:
    facts = list(dict.fromkeys(fact for row in rows for fact in row.facts))
    every = list(dict.fromkeys(metric for row in rows for metric in row.values))
    metrics = [*(metric for metric in chosen if metric in every), *(m for m in every if m not in chosen)]
    best = {} if signed else {metric: best_of(metric, rows) for metric in metrics}
    columns = [Column(fact, number=fact != "method") for fact in facts]
    columns += [
        Column(metric, extra=metric not in chosen, hint=f"{'lower' if lower_is_better(metric) else 'higher'} is better")
        for metric in metrics
    ]
    lines = []
    for row in rows:
        cells = [_fact(row.facts.get(fact, "")) for fact in facts]
        cells += [_number(row.values.get(metric), metric, best.get(metric), signed) for metric in metrics]
        lines.append(
            (row.run, Line(row.arm or row.run, tuple(cells), None if row.arm else marks.get(row.run), bool(row.arm)))
        )
    groups = tuple(tuple(line for _, line in group) for _, group in groupby(lines, key=lambda item: item[0]))
    return Table(name, tuple(columns), groups)


def _number(number: Number | None, metric: str, best: float | None, signed: bool) -> Cell:
    if not number:
        return Cell("-")
    value, low, high = number["value"], number.get("low"), number.get("high")
    text = figure(value)
    interval = "" if low is None or high is None else f"[{figure(low)}, {figure(high)}]"
    look = "best" if best is not None and value == best else ""
    if signed:
        text = f"+{text}" if value > 1e-9 else text
        if excludes_zero(number):
            look = "better" if (value < 0) == lower_is_better(metric) else "worse"
            interval += " *"
    return Cell(text, interval, value, look)


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
