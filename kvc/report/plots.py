"""Which plots a comparison has."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kvc.report.cost import Point, choose_cost, points, qualities
from kvc.report.curves import Curve, read_curves
from kvc.report.figures import draw_curves, draw_quality, front_of
from kvc.report.folder import Finished
from kvc.report.marks import Mark

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST = 8  # plots of one kind


@dataclass(frozen=True)
class Plot:
    """One plot, or a sentence in its place.

    Attributes:
        title: What it shows.
        figure: The plot; None if there is nothing to draw.
        note: A sentence below it.
    """

    title: str
    figure: "Figure | None"
    note: str = ""


@dataclass
class Drawing:
    """Every plot of a comparison.

    Attributes:
        quality: One for each metric: against its cost.
        curves: One for each metric of the training.
        curve_values: Metric to label of a run to its (step, value) pairs.
        missing: One sentence for each run without a learning curve.
    """

    quality: list[Plot] = field(default_factory=list)
    curves: list[Plot] = field(default_factory=list)
    curve_values: dict[str, dict[str, Curve]] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)

    @property
    def figures(self) -> "dict[str, Figure]":
        """Name to figure, for files and for TensorBoard."""
        named = [(f"quality/{plot.title}", plot.figure) for plot in self.quality]
        named += [(f"curves/{plot.title}", plot.figure) for plot in self.curves]
        return {name: figure for name, figure in named if figure is not None}


def draw(runs: Sequence[Finished], metrics: Sequence[str], marks: Mapping[str, Mark], cost: str | None) -> Drawing:
    """Draw everything.

    Args:
        runs: The runs.
        metrics: Metrics to draw; those that are costs themselves are left out.
        marks: How each run is drawn.
        cost: What to set them against; chosen for each metric if None.

    Raises:
        UserError: If no run has that cost.
    """
    results = {run.label: run.result for run in runs}
    wanted = qualities(metrics)
    drawing = Drawing(quality=[_quality(results, metric, marks, cost) for metric in wanted[:MOST]])
    if wanted[MOST:]:
        drawing.quality.append(Plot("Further metrics", None, f"Not drawn: {', '.join(wanted[MOST:])}; see --metric."))
    curves = read_curves(runs)
    drawing.curve_values, drawing.missing = curves.tags, curves.missing
    tags = list(curves.tags)
    drawing.curves = [Plot(tag, draw_curves(curves.tags[tag], marks, tag)) for tag in tags[:MOST]]
    if tags[MOST:]:
        drawing.curves.append(Plot("Further metrics", None, f"Not drawn: {', '.join(tags[MOST:])}."))
    return drawing


def front_sentence(found: Sequence[Point], quality: str) -> str:
    """Who is on the Pareto front, in words."""
    return f"On the Pareto front: {'; '.join(found[i].name for i in front_of(found, quality))}."


def _quality(results: dict[str, dict[str, Any]], metric: str, marks: Mapping[str, Mark], asked: str | None) -> Plot:
    cost = choose_cost(results, metric, asked)
    found = points(results, metric, cost)
    title = f"{metric} against {cost}"
    if not any(point.cost for point in found):
        return Plot(title, None, f"No run or arm has both {metric} and {cost}.")
    note = front_sentence(found, metric)
    without = list(dict.fromkeys(point.run for point in found if not point.arm and not point.cost))
    if without:
        note += f" Without {cost}: {', '.join(without)}."
    return Plot(title, draw_quality(found, marks, metric, cost), note)
