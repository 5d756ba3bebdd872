"""Cells: files with the same settings, one a seed; their scores by arm and question, with intervals over questions."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from kvc.core.results import Value
from kvc.errors import UserError
from kvc.scoring.files import Key, Samples
from kvc.scoring.grading import Graded, grade
from kvc.scoring.intervals import difference, mean
from kvc.scoring.passk import default_ks

METHOD = "memory"
IMPLIED = {"model_hash": "model", "data_limit": "documents"}
"""Settings that go without saying where others differ."""
Scores = dict[Key, dict[str, float]]
"""Metrics of each question, means over the files of a cell."""


@dataclass
class Cell:
    """Files that differ in nothing but seeds and questions.

    Attributes:
        label: The settings that tell it from the other cells.
        settings: All of them.
        files: Its files.
        graded: By arm, each question of each file.
    """

    label: str
    settings: dict[str, Any]
    files: list[Path] = field(default_factory=list)
    graded: dict[str, list[tuple[Path, Graded]]] = field(default_factory=dict)
    _scores: dict[str, Scores] = field(default_factory=dict, init=False, repr=False)

    @property
    def method(self) -> str:
        """The arm that the others stand beside: the memory, where it was asked."""
        return METHOD if METHOD in self.graded else next(iter(self.graded))

    @property
    def others(self) -> list[str]:
        """The other arms."""
        return [arm for arm in self.graded if arm != self.method]

    def scores(self, arm: str) -> Scores:
        """Metrics of the questions of an arm, each the mean over the files that ask it."""
        if arm not in self._scores:
            found: dict[Key, list[dict[str, float]]] = {}
            for _, graded in self.graded.get(arm, []):
                found.setdefault(graded.sampled.key, []).append(graded.scores)
            self._scores[arm] = {key: _means(many) for key, many in found.items()}
        return self._scores[arm]

    def values(self, arm: str) -> dict[str, Value]:
        """Every metric of an arm with its interval over questions."""
        scores = list(self.scores(arm).values())
        return {name: mean([score[name] for score in scores]) for name in _shared(scores)}

    def differences(self, other: str) -> dict[str, Value]:
        """Every metric of the first arm minus that of another, paired by question."""
        ours, theirs = self.scores(self.method), self.scores(other)
        both = [key for key in ours if key in theirs]
        names = _shared([scores[key] for scores in (ours, theirs) for key in both])
        return {name: difference([ours[key][name] - theirs[key][name] for key in both]) for name in names}


def make_cells(files: Sequence[Samples], ks: Sequence[int] | None = None) -> tuple[list[Cell], list[int]]:
    """Grade all files and put those of equal settings together.

    Args:
        files: At least one.
        ks: Sizes of draws for pass@k; powers of two up to the smallest number of samples if None.

    Returns:
        The cells in the order of the files, and the sizes of draws.

    Raises:
        UserError: If a question has fewer samples than a k, or stands twice in an arm with the same settings and seeds.
    """
    smallest = min(
        ((len(item.responses), f.path, arm) for f in files for arm, items in f.arms.items() for item in items),
        key=lambda entry: entry[0],
    )
    sizes = list(ks) if ks else default_ks(smallest[0])
    if max(sizes) > smallest[0]:
        raise UserError(
            f"--k {max(sizes)}: {smallest[1]} has a question with only {smallest[0]} samples in '{smallest[2]}'"
        )
    cells: dict[str, Cell] = {}
    seen: dict[tuple[Any, ...], Path] = {}
    for file in files:
        identity = json.dumps(file.settings, sort_keys=True, default=str)
        cell = cells.setdefault(identity, Cell("", file.settings))
        cell.files.append(file.path)
        for arm, items in file.arms.items():
            for item in items:
                other = seen.setdefault((identity, file.seeds, arm, item.key), file.path)
                if other is not file.path:
                    twin = f"question {item.key[0]} of '{arm}' is in {other} with equal settings and seeds"
                    raise UserError(f"{file.path}: {twin}: score them apart")
                cell.graded.setdefault(arm, []).append((file.path, grade(item, sizes)))
    found = list(cells.values())
    for cell, label in zip(found, _labels(found)):
        cell.label = label
    return found, sizes


def varying(cells: Sequence[Cell]) -> dict[str, list[Any]]:
    """Settings that differ between cells, with their values in order of appearance."""
    keys = dict.fromkeys(key for cell in cells for key in cell.settings)
    values = {
        key: list({_text(cell.settings.get(key)): cell.settings.get(key) for cell in cells}.values()) for key in keys
    }
    return {key: found for key, found in values.items() if len(found) > 1}


def _labels(cells: Sequence[Cell]) -> list[str]:
    """What tells the cells apart; a single one is called after its first file."""
    if len(cells) == 1:
        path = cells[0].files[0].resolve()
        return [path.parent.name if path.stem == "ask" else path.stem]
    keys = [key for key in varying(cells) if not any(isinstance(cell.settings.get(key), dict) for cell in cells)]
    keys = [key for key in keys if IMPLIED.get(key) not in keys]
    return [", ".join(f"{key}={_text(cell.settings.get(key))}" for key in keys) for cell in cells]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else "none" if value is None else json.dumps(value, default=str)


def _means(many: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: float(np.mean([scores[name] for scores in many])) for name in _shared(many)}


def _shared(many: Sequence[dict[str, float]]) -> list[str]:
    return [name for name in many[0] if all(name in other for other in many)] if many else []
