"""One picture that explains a classifier: its precision-recall curve, and a trace coloured by its probability."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from kvc.core.module import Record
from kvc.core.results import Summary

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = 74
MAX_LINES = 26
INK, OURS, RULES = "#1b1b1f", "#0b6e4f", ("#c8553d", "#8a5a9e", "#3d6fb4", "#8c8c8c")


def draw(records: Sequence[Record], summary: Summary, threshold: float) -> "Figure":
    """Draw both panels.

    Args:
        records: Scored traces.
        summary: Their metrics.
        threshold: The classifier fires at this probability.
    """
    from matplotlib.figure import Figure

    record = _typical(records)
    lines = _layout(record)
    # The trace decides the height: every line of it gets the same room.
    figure = Figure(figsize=(13, max(6.2, 2.2 + 0.27 * len(lines))), facecolor="white", layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.35))
    _curves(left, records, summary, threshold)
    _trace(figure, right, lines, threshold)
    return figure


def _curves(axes: Any, records: Sequence[Record], summary: Summary, threshold: float) -> None:
    from sklearn.metrics import precision_recall_curve

    labels = np.concatenate([r["labels"] for r in records])
    scores = np.concatenate([r["scores"] for r in records])
    precision, recall, _ = precision_recall_curve(labels, scores)
    value = summary.metrics["average_precision"]
    axes.step(recall, precision, where="post", color=OURS, lw=2.2, label=f"classifier   AP {_with_interval(value)}")
    own = summary.metrics
    axes.plot(own["recall"].value, own["precision"].value, "o", color=OURS, ms=8, mec="white", zorder=5)
    for (name, metrics), color in zip(summary.arms.items(), RULES):
        label = f"{name}   AP {_with_interval(metrics['average_precision'])}"
        if name == "random":
            axes.axhline(labels.mean(), color=color, lw=1.4, ls=":", label=label)
        else:
            axes.plot(metrics["recall"].value, metrics["precision"].value, "D", color=color, ms=8, label=label)
    axes.set(
        xlim=(-0.02, 1.02), ylim=(-0.02, 1.04), xlabel="recall: COMPs found", ylabel="precision: right when it fires"
    )
    axes.set_title(f"Where to compress: {len(records)} held-out traces", loc="left", fontsize=12, weight="bold")
    # Below the axes: inside, a curve or a rule would sooner or later be hidden.
    legend = axes.legend(loc="upper left", bbox_to_anchor=(-0.02, -0.11), fontsize=9, frameon=False)
    legend.set_title(f"dot: threshold {threshold:.2f} from validation data; diamonds: rules without training")
    legend.get_title().set(fontsize=8.5, color="#555555")
    legend._legend_box.align = "left"
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)


def _with_interval(value: Any) -> str:
    return f"{value.value:.3f} [{value.low:.3f}, {value.high:.3f}]"


def _typical(records: Sequence[Record]) -> Record:
    """A trace of middling length among those with a few COMPs: neither trivial nor too long to read."""
    fitting = [r for r in records if 3 <= sum(r["labels"]) <= 6 and len(_layout(r)) <= MAX_LINES] or list(records)
    return sorted(fitting, key=lambda r: (len(r["text"]), r["id"]))[len(fitting) // 2]


def _layout(record: Record) -> list[list[tuple[str, float, int]]]:
    """Break the trace into lines of `(text, probability, label)` pieces, one piece a token."""
    lines: list[list[tuple[str, float, int]]] = [[]]
    start = width = 0
    for end, score, label in zip(record["ends"], record["scores"], record["labels"]):
        piece = record["text"][start:end]
        start = end
        for number, part in enumerate(piece.split("\n")):
            if number or width + len(part) > COLUMNS:
                lines.append([])
                width = 0
                part = part if number else part.lstrip(" ")
            width += len(part)
            # The score belongs to the last visible part of a token that spans a line break.
            lines[-1].append((part, score, label))
    return lines


def _trace(figure: Any, axes: Any, lines: list[list[tuple[str, float, int]]], threshold: float) -> None:
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, Normalize

    shades = LinearSegmentedColormap.from_list("comp", ["#ffffff", "#f7d774", "#e4572e"])
    assert colormaps is not None
    axes.set(xlim=(0, COLUMNS + 4), ylim=(min(len(lines), MAX_LINES) + 2.6, -1.2))
    axes.axis("off")
    axes.set_title("One trace: colour is the probability that a COMP follows", loc="left", fontsize=12, weight="bold")
    style = {"family": "monospace", "fontsize": 8.6, "va": "center", "color": INK}
    for row, line in enumerate(lines[:MAX_LINES]):
        column = 0.0
        for text, score, label in line:
            if not text:
                continue
            axes.barh(row, len(text), left=column, height=0.86, color=shades(score), lw=0)
            for offset, letter in enumerate(text):
                axes.text(column + offset + 0.5, row, letter, ha="center", **style)
            column += len(text)
            if label:
                axes.plot(column, row - 0.56, marker="v", color=OURS, ms=6.5, clip_on=False)
            if score >= threshold:
                axes.plot(column, row + 0.56, marker="^", color="#b3261e", ms=6.5, clip_on=False)
    foot = min(len(lines), MAX_LINES) + 1.0
    axes.plot(1, foot, marker="v", color=OURS, ms=8)
    axes.text(2.5, foot, "a COMP follows in the data", fontsize=9, va="center")
    axes.plot(32, foot, marker="^", color="#b3261e", ms=8)
    axes.text(33.5, foot, f"the classifier fires (p ≥ {threshold:.2f})", fontsize=9, va="center")
    bar = figure.colorbar(ScalarMappable(Normalize(0, 1), shades), ax=axes, fraction=0.025, pad=0.01)
    bar.set_label("probability", fontsize=9)
