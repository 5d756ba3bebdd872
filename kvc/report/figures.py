"""The plots of a comparison: quality against cost with the Pareto front, and learning curves."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kvc.report.cost import Point, axis_label, quality_label
from kvc.report.marks import ARM, INK, MARKERS, Mark, shorten, style
from kvc.report.pareto import front
from kvc.report.table import Number, lower_is_better

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

WIDTH, HEIGHT, LINE = 4.8, 3.1, 0.165  # inches; LINE: one row of the legend
LOG_FROM = 10.0  # ratio of the largest to the smallest cost from which the axis is logarithmic
FAR = 1.5  # arms without a cost are drawn while they lie within this many spans of the points
RUN, ARMS, FRONT = range(3)  # kinds of entries, in the order of the legend
Legend = dict[tuple[int, str], "Line2D"]
DASHES = ("--", ":", "-.", (0, (8, 2)), (0, (1, 3)), (0, (6, 2, 1, 2, 1, 2)))


def draw_quality(points: Sequence[Point], marks: Mapping[str, Mark], quality: str, cost: str) -> "Figure":
    """One metric against one cost, with 95 % intervals and the Pareto front.

    Runs are filled and coloured, arms grey and hollow. An arm that has no such cost is a horizontal line.

    Args:
        points: At least one with a cost.
        marks: How each run is drawn.
        quality: Metric on the vertical axis.
        cost: Metric or fact on the horizontal axis.
    """
    placed = [point for point in points if point.cost is not None]
    assert placed, f"no point of {quality} has {cost}"
    with style():
        figure, axes = _figure()
        best = [placed[i] for i in front_of(placed, quality)]
        arms = list(dict.fromkeys(point.arm for point in points if point.arm))
        legend: Legend = {}
        for point in placed:
            artist = _draw_point(axes, point, marks[point.run], arms)
            legend.setdefault((RUN, point.run) if not point.arm else (ARMS, point.arm), artist)
        legend |= {(ARMS, arm): line for arm, line in _draw_levels(axes, points, arms).items()}
        legend[FRONT, "Pareto front"] = _draw_front(axes, best)
        _scale_cost(axes, [point.cost["value"] for point in placed if point.cost], cost)
        axes.set(xlabel=axis_label(cost), ylabel=quality_label(quality))
        _draw_legend(figure, legend)
    return figure


def front_of(points: Sequence[Point], quality: str) -> list[int]:
    """Indices of the points on the Pareto front; those without a cost are never on it."""
    costs = [point.cost["value"] if point.cost else float("nan") for point in points]
    return front(costs, [point.quality["value"] for point in points], lower_is_better(quality))


def draw_curves(curves: Mapping[str, Sequence[tuple[int, float]]], marks: Mapping[str, Mark], tag: str) -> "Figure":
    """One metric over the steps of training, one line a run.

    Args:
        curves: Label of a run to its (step, value) pairs.
        marks: How each run is drawn.
        tag: Name of the metric.
    """
    from matplotlib.ticker import MaxNLocator

    with style():
        figure, axes = _figure()
        legend: Legend = {}
        for run, values in curves.items():
            steps, numbers = zip(*values)
            mark = marks[run]
            often: dict[str, Any] = {"markevery": max(1, len(steps) // 8), "ms": 4.5, "lw": 1.5}
            (legend[RUN, run],) = axes.plot(steps, numbers, marker=mark.marker, color=mark.hex, **often)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set(xlabel="optimiser step", ylabel=quality_label(tag))
        _draw_legend(figure, legend)
    return figure


def _figure() -> tuple["Figure", "Axes"]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, HEIGHT), facecolor="none", layout="constrained")
    axes = figure.subplots()
    axes.set_facecolor("none")
    return figure, axes


def _draw_front(axes: "Axes", best: Sequence[Point]) -> "Line2D":
    costs = [point.cost["value"] for point in best if point.cost]
    values = [point.quality["value"] for point in best]
    (line,) = axes.step(costs, values, where="post", color=INK, lw=1.1, alpha=0.7, zorder=2)
    # The staircase goes through the points; rings say which they are.
    axes.plot(costs, values, "o", ms=13, mfc="none", mec=INK, mew=1.0, alpha=0.7, zorder=2)
    return line


def _draw_point(axes: "Axes", point: Point, mark: Mark, arms: list[str]) -> "Line2D":
    assert point.cost is not None
    x, y = point.cost["value"], point.quality["value"]
    if point.arm:
        marker = list(MARKERS)[arms.index(point.arm) % len(MARKERS)]
        look: dict[str, Any] = {"color": ARM, "marker": marker, "mfc": "none", "mew": 1.2}
    else:
        look = {"color": mark.hex, "marker": mark.marker, "mew": 0}
    bars = {"fmt": "none", "ecolor": look["color"], "elinewidth": 1.1}
    axes.errorbar(x, y, _bars(point.quality), _bars(point.cost), zorder=3, **bars)
    (artist,) = axes.plot(x, y, ls="none", ms=6.5, zorder=4, **look)
    return artist


def _bars(number: Number) -> list[list[float]] | None:
    """Distances from a value down and up to the ends of its interval."""
    low, high = number.get("low"), number.get("high")
    if low is None or high is None:
        return None
    # A percentile interval may lie beside its estimate.
    return [[max(0.0, number["value"] - low)], [max(0.0, high - number["value"])]]


def _draw_levels(axes: "Axes", points: Sequence[Point], arms: list[str]) -> "dict[str, Line2D]":
    """Arms that have no cost of this kind as lines, unless they would press the points together."""
    low, high = axes.get_ylim()
    room = FAR * (high - low)
    lines = {}
    for point in points:
        value = point.quality["value"]
        if point.arm and point.cost is None and low - room <= value <= high + room:
            dashes = DASHES[arms.index(point.arm) % len(DASHES)]
            lines[point.arm] = axes.axhline(value, color=ARM, lw=1.1, ls=dashes, zorder=1)
    return lines


def _scale_cost(axes: "Axes", costs: Sequence[float], cost: str) -> None:
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    logarithmic = min(costs) > 0 and max(costs) / min(costs) >= LOG_FROM
    if logarithmic:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_minor_formatter(NullFormatter())
    if logarithmic or max(costs) >= 10_000:
        axes.xaxis.set_major_formatter(EngFormatter("B" if "bytes" in cost else "", sep=" " if "bytes" in cost else ""))
    axes.margins(x=0.08, y=0.1)


def _draw_legend(figure: "Figure", legend: Legend) -> None:
    """Below the axes: inside, a point or a line would sooner or later be hidden."""
    keys = sorted(legend, key=lambda key: key[0])
    labels = shorten([name for _, name in keys])
    longest = max(map(len, labels))
    columns = min(len(labels), 4 if longest <= 13 else 3 if longest <= 20 else 2 if longest <= 32 else 1)
    rows = -(-len(labels) // columns)
    figure.set_figheight(HEIGHT + LINE * rows)
    figure.legend(
        [legend[key] for key in keys],
        labels,
        loc="outside lower left",
        ncols=columns,
        fontsize=8,
        frameon=False,
        labelcolor=INK,
        handletextpad=0.5,
        columnspacing=1.2,
        borderaxespad=0.2,
    )
