"""What one setting does: means over the cells that share its value, the same questions in all of them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvc.core.results import Value
from kvc.scoring.cells import Cell
from kvc.scoring.files import Key
from kvc.scoring.intervals import mean

STUDIED = "documents x epochs"
"""How many documents were read in all: a setting that follows from two."""


@dataclass(frozen=True)
class Marginal:
    """A metric over some cells.

    Attributes:
        value: Mean over questions of the mean over cells, with its interval over questions.
        cells: Number of cells.
        best: The best cell; the more cells, the more of it is luck.
    """

    value: Value
    cells: int
    best: float

    def as_dict(self) -> dict[str, float]:
        """All numbers."""
        return {**self.value.as_dict(), "cells": self.cells, "best": self.best}


@dataclass(frozen=True)
class Ranked:
    """A cell that was chosen on some questions.

    Attributes:
        cell: The cell.
        chosen: Its mean on the questions that it was chosen on.
        measured: On the others; on the same ones where there are too few to part them.
    """

    cell: Cell
    chosen: Value
    measured: Value


def marginal(cells: Sequence[Cell], arm: str, metric: str) -> Marginal | None:
    """A metric of an arm over cells; None where no cell has both."""
    found = [_metric(cell, arm, metric) for cell in cells]
    found = [scores for scores in found if scores]
    if not found:
        return None
    by_question: dict[Key, list[float]] = {}
    for scores in found:
        for key, score in scores.items():
            by_question.setdefault(key, []).append(score)
    value = mean([float(np.mean(scores)) for scores in by_question.values()])
    return Marginal(value, len(found), max(float(np.mean(list(scores.values()))) for scores in found))


def settings_of(cell: Cell) -> dict[str, Any]:
    """Settings of a cell that may be axes, with how many documents it read."""
    found = dict(cell.settings)
    documents, epochs = found.get("documents"), found.get("num_epochs")
    if isinstance(documents, int) and isinstance(epochs, int):
        found[STUDIED] = documents * epochs
    return found


def levels(cells: Sequence[Cell], key: str) -> list[Any]:
    """Values of a setting: numbers in order, then texts as they come, `keep` and nothing first."""
    values = {json.dumps(settings_of(cell).get(key), default=str): settings_of(cell).get(key) for cell in cells}
    return sorted(values.values(), key=_order)


def _order(value: Any) -> tuple[int, float, str]:
    if isinstance(value, int | float):
        return (1, value, "")
    # place:256 before place:1024.
    name, _, number = str(value).partition(":")
    return (0, 0, "") if value is None else (2, float(number) if number.isdecimal() else -1, name)


def having(cells: Sequence[Cell], settings: Mapping[str, Any]) -> list[Cell]:
    """Cells with these values."""
    return [cell for cell in cells if all(settings_of(cell).get(key) == value for key, value in settings.items())]


def ranking(cells: Sequence[Cell], arm: str, metric: str, count: int = 10) -> tuple[list[Ranked], bool]:
    """The best cells, chosen on every other question and measured on the rest, so that luck does not count.

    Returns:
        The cells, best first on the questions that they were chosen on, and whether the others are others.
    """
    found = [(cell, _metric(cell, arm, metric)) for cell in cells]
    found = [(cell, scores) for cell, scores in found if scores]
    keys = sorted({key for _, scores in found for key in scores})
    chosen_on, measured_on = set(keys[::2]), set(keys[1::2])
    parted = len(keys) >= 4 and all(scores.keys() & chosen_on and scores.keys() & measured_on for _, scores in found)
    if not parted:
        chosen_on = measured_on = set(keys)
    ranked = [
        Ranked(cell, *(mean([scores[key] for key in scores if key in part]) for part in (chosen_on, measured_on)))
        for cell, scores in found
    ]
    return sorted(ranked, key=lambda entry: -entry.chosen.value)[:count], parted


def _metric(cell: Cell, arm: str, metric: str) -> dict[Key, float]:
    return {key: scores[metric] for key, scores in cell.scores(arm).items() if metric in scores}
