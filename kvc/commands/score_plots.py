"""The plots of `kvc score`: heat maps, curves and the best cells, over whichever settings differ."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from kvc.scoring.cells import METHOD, Cell
from kvc.scoring.marginals import STUDIED, having, levels, marginal, ranking

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CURVES = ("budget", "window", "documents", "rotation", "num_epochs", "summary_tokens", STUDIED)
GROUPS = ("model", "mode", "summary_complexity", "policy", "budget", "summary_tokens")
"""Settings that may tell lines apart; the first that differs is taken."""
HEATS = (
    ("documents", "rotation"),
    ("window", "budget"),
    ("num_epochs", "documents"),
    ("rotation", "budget"),
    ("summary_tokens", "budget"),
    ("summary_complexity", "budget"),
    ("model", "mode"),
    *((name, "mode") for name in ("rotation", "budget", "documents", "num_epochs")),
)
MOST_LINES = 7


def figures(cells: Sequence[Cell], metric: str) -> "dict[str, Figure]":
    """Every figure that the cells allow.

    Args:
        cells: Scored cells; those without a memory give the levels that it is compared with.
        metric: What is drawn.

    Returns:
        Name to figure; empty if no setting of the memories differs.
    """
    from kvc.report.cell_figures import draw_heat, draw_lines, draw_ranking

    memories = [cell for cell in cells if METHOD in cell.graded]
    choices = {key: levels(memories, key) for key in {*CURVES, *GROUPS, *(key for pair in HEATS for key in pair)}}
    differ = [key for key, values in choices.items() if len(values) > 1]
    arms = list(dict.fromkeys(arm for cell in cells for arm in cell.graded if arm != METHOD))
    beside = {arm: number.as_dict() for arm in arms if (number := marginal(cells, arm, metric))}
    drawn: dict[str, Figure] = {}
    for key in (key for key in CURVES if key in differ):
        group = next((g for g in GROUPS if g in differ and g != key and len(choices[g]) <= MOST_LINES), None)
        lines = {
            METHOD if group is None else f"{group} {_word(value)}": [
                _number(memories, metric, {key: place, **({group: value} if group else {})}) for place in choices[key]
            ]
            for value in (choices[group] if group else [None])
        }
        drawn[f"{metric} by {key}"] = draw_lines(key, _places(choices[key]), lines, beside, metric)
    for row, column in HEATS:
        if row in differ and column in differ:
            numbers = [[_number(memories, metric, {row: r, column: c}) for c in choices[column]] for r in choices[row]]
            names = [(key, [_word(value) for value in choices[key]]) for key in (row, column)]
            drawn[f"{metric} by {row} and {column}"] = draw_heat(numbers, names[0], names[1], metric)
    if len(memories) > 1:
        best, parted = ranking(memories, METHOD, metric)
        entries = [(entry.cell.label, entry.chosen.as_dict(), entry.measured.as_dict()) for entry in best]
        drawn[f"{metric} of the best cells"] = draw_ranking(entries, beside, parted, metric)
    return drawn


def _number(cells: Sequence[Cell], metric: str, settings: dict[str, Any]) -> dict[str, float] | None:
    found = marginal(having(cells, settings), METHOD, metric)
    return None if found is None else found.as_dict()


def _places(values: Sequence[Any]) -> list[Any]:
    """Numbers if all are, else words."""
    return (
        list(values) if all(isinstance(value, int | float) for value in values) else [_word(value) for value in values]
    )


def _word(value: Any) -> str:
    return "none" if value is None else str(value)
