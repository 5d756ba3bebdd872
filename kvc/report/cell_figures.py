"""Figures over the settings of many cells: heat maps, curves and the best cells, with numbers and intervals."""

from collections.abc import Mapping, Sequence
from textwrap import fill
from typing import TYPE_CHECKING, Any

from kvc.report.marks import ARM, INK, MARKERS, MUTED, PALETTE, style
from kvc.report.table import Number, figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = "YlGnBu"
DASHES = ("--", ":", "-.", (0, (8, 2)), (0, (1, 3)))
BEST = "best cell (biased upwards)"
LONGEST = 52  # characters of a line of a label
MOST_TICKS = 9  # with more values they stand at equal distances
LOG_FROM = 8.0  # ratio of the largest to the smallest value from which the axis is logarithmic


def draw_heat(
    numbers: Sequence[Sequence[Number | None]],
    rows: tuple[str, Sequence[str]],
    columns: tuple[str, Sequence[str]],
    what: str,
) -> "Figure":
    """A metric over two settings: mean, interval and number of cells in every field.

    Args:
        numbers: By row and column: `value`, `low`, `high`, `n` and `cells`; None where there is no cell.
        rows: Name of the setting, and its values.
        columns: The same.
        what: The metric.
    """
    import matplotlib as mpl
    import numpy as np
    from matplotlib.figure import Figure

    values = np.array(
        [[np.nan if number is None else number["value"] for number in row] for row in numbers], dtype=float
    )
    with style():
        result = Figure(figsize=(1.9 + 1.0 * len(columns[1]), 1.3 + 0.62 * len(rows[1])), layout="constrained")
        axes = result.subplots()
        top = max(float(np.nanmax(values)), 1e-9)
        colors = mpl.colormaps[COLORS]
        axes.imshow(np.ma.masked_invalid(values), cmap=colors, vmin=0, vmax=top, aspect="auto")
        for row, line in enumerate(numbers):
            for column, number in enumerate(line):
                ink = "white" if number and number["value"] > 0.55 * top else INK
                axes.text(column, row, _field(number), ha="center", va="center", fontsize=7.5, color=ink)
        axes.set_xticks(range(len(columns[1])), columns[1])
        axes.set_yticks(range(len(rows[1])), rows[1])
        axes.set(xlabel=columns[0], ylabel=rows[0])
        axes.set_title(f"{what}, {_units([number for line in numbers for number in line])}", fontsize=8, loc="left")
        axes.grid(visible=False)
        for side in axes.spines.values():
            side.set_visible(False)
    return result


def draw_lines(
    setting: str,
    places: Sequence[Any],
    lines: Mapping[str, Sequence[Number | None]],
    levels: Mapping[str, Number],
    what: str,
) -> "Figure":
    """A metric over one setting: a line for each group of cells, and arms that do not depend on it as levels.

    A hollow marker is the best single cell behind a mean: the more cells, the more of it is luck.

    Args:
        setting: Its name.
        places: Its values; an axis with a scale if all are numbers.
        lines: Name of a group to its numbers at the places.
        levels: Name of an arm to its number.
        what: The metric.
    """
    from matplotlib.figure import Figure

    with style():
        result = Figure(figsize=(6.4, 3.4), layout="constrained")
        axes = result.subplots()
        numeric = len(places) <= MOST_TICKS and all(isinstance(place, int | float) for place in places)
        positions = [float(place) if numeric else float(index) for index, place in enumerate(places)]
        logarithmic = numeric and min(positions) > 0 and max(positions) / min(positions) >= LOG_FROM
        if logarithmic:
            axes.set_xscale("log")
        for index, (name, numbers) in enumerate(lines.items()):
            shift = (index - (len(lines) - 1) / 2) * 0.012
            aside = [p * 10**shift if logarithmic else p + shift * (max(positions) - min(positions)) for p in positions]
            _line(axes, name, aside, numbers, index)
        _levels(axes, levels)
        counts = [sum(int(number["cells"]) for number in column if number) for column in zip(*lines.values())]
        axes.set_xticks(positions, [f"{place}\n{count}" for place, count in zip(places, counts)], fontsize=8)
        axes.minorticks_off()
        axes.set(xlabel=f"{setting} (below: number of cells)", ylabel=what)
        axes.set_title(_units([number for numbers in lines.values() for number in numbers]), fontsize=8, loc="left")
        handles, labels = axes.get_legend_handles_labels()
        # Matplotlib lists what has error bars last.
        order = sorted(range(len(labels)), key=lambda i: (labels[i] == BEST, labels[i] not in lines))
        chosen = [[handles[i] for i in order], [labels[i] for i in order]]
        result.legend(*chosen, loc="outside right upper", fontsize=8, frameon=False, labelcolor=INK)
    return result


def draw_ranking(
    entries: Sequence[tuple[str, Number, Number]], levels: Mapping[str, Number], parted: bool, what: str
) -> "Figure":
    """The best cells: what they were chosen by, and what they reach on questions that they were not chosen on.

    Args:
        entries: Label, number that it was chosen by, number that was measured; best first.
        levels: Name of an arm to its number.
        parted: Whether the two numbers come from different questions.
        what: The metric.
    """
    from matplotlib.figure import Figure

    with style():
        result = Figure(figsize=(8.4, 1.2 + 0.38 * len(entries)), layout="constrained")
        axes = result.subplots()
        rows = list(range(len(entries)))[::-1]
        measured = [entry[2] for entry in entries]
        name = (
            "measured on the other questions" if parted else "on the questions that it was chosen by (biased upwards)"
        )
        look: dict[str, Any] = {"fmt": "o", "color": PALETTE[0], "ms": 5, "elinewidth": 1.2, "label": name}
        axes.errorbar([number["value"] for number in measured], rows, xerr=_bars(measured), **look)
        if parted:
            chosen = [entry[1]["value"] for entry in entries]
            axes.plot(
                chosen, rows, "D", mfc="none", mec=MUTED, ms=5, label="on those that it was chosen by (biased upwards)"
            )
        for (arm, number), dashes in zip(levels.items(), DASHES * len(levels)):
            axes.axvline(number["value"], color=ARM, ls=dashes, lw=1.2, label=arm)
        axes.set_yticks(rows, [fill(entry[0], LONGEST) for entry in entries], fontsize=7)
        axes.set_xlabel(what)
        axes.set_title(_units(measured), fontsize=8, loc="left")
        result.legend(loc="outside lower left", fontsize=8, frameon=False, labelcolor=INK, ncols=2)
    return result


def _line(axes: "Axes", name: str, places: list[float], numbers: Sequence[Number | None], index: int) -> None:
    found = [(place, number) for place, number in zip(places, numbers) if number]
    if not found:
        return
    at, known = [place for place, _ in found], [number for _, number in found]
    color, marker = PALETTE[index % len(PALETTE)], list(MARKERS)[index % len(MARKERS)]
    look: dict[str, Any] = {"color": color, "marker": marker, "ms": 5, "lw": 1.5, "elinewidth": 1.1, "capsize": 2}
    axes.errorbar(at, [number["value"] for number in known], _bars(known), label=name, **look)
    many = [(place, number["best"]) for place, number in found if number["cells"] > 1]
    if many:
        named: dict[str, Any] = (
            {"label": BEST} if all(label != BEST for label in axes.get_legend_handles_labels()[1]) else {}
        )
        axes.plot(*zip(*many), ls="none", marker=marker, mfc="none", mec=color, ms=5, alpha=0.8, **named)


def _levels(axes: "Axes", levels: Mapping[str, Number]) -> None:
    for (arm, number), dashes in zip(levels.items(), DASHES * len(levels)):
        axes.axhline(number["value"], color=ARM, ls=dashes, lw=1.3, label=arm, zorder=1)
        if "low" in number:
            axes.axhspan(number["low"], number["high"], color=ARM, alpha=0.12, lw=0, zorder=0)


def _bars(numbers: Sequence[Number]) -> list[list[float]]:
    down = [max(0.0, number["value"] - number.get("low", number["value"])) for number in numbers]
    up = [max(0.0, number.get("high", number["value"]) - number["value"]) for number in numbers]
    return [down, up]


def _field(number: Number | None) -> str:
    if number is None:
        return ""
    ends = f"\n{figure(number['low'])} - {figure(number['high'])}" if "low" in number else ""
    return f"{figure(number['value'])}{ends}\n{number['cells']:g} {_cells(number['cells'])}"


def _cells(count: float) -> str:
    return "cell" if count == 1 else "cells"


def _units(numbers: Sequence[Number | None]) -> str:
    """How many questions are behind the numbers."""
    counts = sorted({int(number["n"]) for number in numbers if number})
    shown = " to ".join(map(str, counts[:: len(counts) - 1 or 1])) if counts else "no"
    some = any("low" in number for number in numbers if number)
    return f"n = {shown} questions" + (", 95 % intervals over questions" if some else ", too few for intervals")
