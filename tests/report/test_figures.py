import re
import xml.etree.ElementTree as ElementTree
from typing import Any

import pytest
from matplotlib.colors import to_hex

from kvc.report.cost import Point
from kvc.report.figures import draw_curves, draw_quality
from kvc.report.marks import PALETTE, marks_of, shorten
from kvc.report.render import as_png, as_svg, file_names

METRIC, COST, FRONT = "exact_match", "kv_bytes_peak", "Pareto front"


def value(number: float, half: float | None = None) -> dict[str, float]:
    return {"value": number} if half is None else {"value": number, "low": number - half, "high": number + half}


def point(run: str, cost: float | None, quality: float, arm: str = "") -> Point:
    return Point(run, arm, None if cost is None else value(cost, 5.0), value(quality, 0.05))


POINTS = [
    point("small", 100, 0.5),
    point("large", 40_000, 0.8),
    point("poor", 50_000, 0.6),
    point("small", 90_000, 0.9, "full_kv"),
    point("small", None, 0.4, "no_context"),
    point("small", None, -9.0, "hopeless"),
]
MARKS = marks_of(["small", "large", "poor"])


def legend(figure: Any) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def entry(figure: Any, label: str) -> Any:
    """What stands beside a label in the legend: it looks like what is drawn."""
    return figure.legends[0].legend_handles[legend(figure).index(label)]


def drawn(figure: Any) -> list[list[list[float]]]:
    return [line.get_xydata().tolist() for line in figure.axes[0].lines]


def test_quality_against_bytes() -> None:
    figure = draw_quality(POINTS, MARKS, METRIC, COST)
    axes = figure.axes[0]
    assert axes.get_xlabel() == "kv_bytes_peak (bytes), less is better"
    assert axes.get_ylabel() == "exact_match, higher is better"
    assert axes.get_xscale() == "log"
    # The arm without bytes is a line; the one far below would press the rest together.
    assert legend(figure) == ["small", "large", "poor", "full_kv", "no_context", FRONT]
    assert axes.get_ylim()[0] > 0
    # The staircase, and the rings around its points.
    assert drawn(figure).count([[100, 0.5], [40_000, 0.8], [90_000, 0.9]]) == 2
    assert "steps-post" in {line.get_drawstyle() for line in axes.lines}
    assert [[0, 0.4], [1, 0.4]] in drawn(figure)
    assert [[50_000, 0.6]] in drawn(figure)
    as_png(figure)
    assert any("kB" in text.get_text() for text in axes.get_xticklabels())


def test_intervals_are_bars_on_both_axes() -> None:
    figure = draw_quality([point("small", 100, 0.5)], MARKS, METRIC, COST)
    spans = [segment.tolist() for bars in figure.axes[0].collections for segment in bars.get_segments()]
    assert [[95, 0.5], [105, 0.5]] in spans
    assert [[100, 0.45], [100, 0.55]] in spans
    plain = Point("small", "", value(100), value(0.5))
    axes = draw_quality([plain], MARKS, METRIC, COST).axes[0]
    assert not [segment for bars in axes.collections for segment in bars.get_segments()]
    assert axes.get_xscale() == "linear"


def test_runs_differ_by_colour_and_marker_and_arms_are_hollow() -> None:
    figure = draw_quality(POINTS, MARKS, METRIC, COST)
    looks = {(to_hex(entry(figure, run).get_color()), entry(figure, run).get_marker()) for run in MARKS}
    assert looks == {("#0072b2", "o"), ("#d55e00", "s"), ("#009e73", "^")}
    assert entry(figure, "full_kv").get_markerfacecolor() == "none"
    many = marks_of([f"run {i}" for i in range(80)])
    assert len(set(many.values())) == 80


def test_losses_have_their_front_below() -> None:
    points = [point("small", 1, 0.5), point("large", 2, 0.3), point("poor", 3, 0.4)]
    figure = draw_quality(points, MARKS, "val_loss", "kept")
    assert figure.axes[0].get_ylabel() == "val_loss, lower is better"
    assert drawn(figure).count([[1, 0.5], [2, 0.3]]) == 2


def test_learning_curves() -> None:
    curves = {"small": [(1, 0.5), (2, 0.25)], "poor": [(1, 0.9)]}
    figure = draw_curves(curves, MARKS, "val/loss")
    axes = figure.axes[0]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("optimiser step", "val/loss, lower is better")
    assert legend(figure) == ["small", "poor"]
    assert drawn(figure) == [[[1, 0.5], [2, 0.25]], [[1, 0.9]]]
    assert entry(figure, "poor").get_marker() == MARKS["poor"].marker


@pytest.mark.parametrize("name", ["_hidden", "a$b$c", "<b>&amp;", "#0072b2", "x" * 90])
def test_any_name_of_a_run_is_shown(name: str) -> None:
    figure = draw_curves({name: [(1, 1.0)]}, marks_of([name]), "val/loss")
    assert legend(figure) == shorten([name])
    assert len(shorten([name])[0]) <= 45
    svg = ElementTree.fromstring(as_svg(figure, "x0"))
    texts = [element.text for element in svg.iter() if element.tag.endswith("text")]
    assert shorten([name])[0] in texts


def test_names_that_clash_stay_apart() -> None:
    points = [point("full", 1, 0.5), point("full", 2, 0.6, "full"), point(FRONT, 3, 0.7)]
    figure = draw_quality(points, marks_of(["full", FRONT]), METRIC, COST)
    assert legend(figure) == ["full", FRONT, "full", FRONT]
    long = ["a" * 40 + middle + "b" * 40 for middle in "xy"]
    one, other = shorten(long)
    assert one != other


def test_svg_follows_the_page() -> None:
    figure = draw_quality(POINTS, MARKS, METRIC, COST)
    one, other = as_svg(figure, "quality0"), as_svg(figure, "quality1")
    for color in (*PALETTE[:3], "#1b1d21", "#dfe2e6"):
        assert color not in one
    for variable in ("--run-0", "--run-2", "--ink", "--line", "--arm", "--font"):
        assert f"var({variable})" in one
    names = [set(re.findall(r'\bid="([^"]+)"', svg)) for svg in (one, other)]
    assert names[0]
    assert not names[0] & names[1]
    used = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', one))
    assert used <= names[0]
    assert "DejaVu" not in one
    assert one == as_svg(draw_quality(POINTS, MARKS, METRIC, COST), "quality0")


def test_png_and_file_names() -> None:
    assert as_png(draw_curves({"small": [(1, 1.0)]}, MARKS, "val/loss")).startswith(b"\x89PNG")
    assert file_names(["quality/em/a against kept/a", "a b", "a/b", "../../x"]) == [
        "quality_em_a_against_kept_a.png",
        "a_b.png",
        "a_b_2.png",
        "x.png",
    ]
