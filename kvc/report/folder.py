"""Finished runs on the disk: their labels, their results, and where their predictions and events lie."""

import math
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from kvc.errors import UserError
from kvc.runs import PREDICTIONS, RunFolder


@dataclass(frozen=True)
class Finished:
    """One finished run.

    Attributes:
        label: Its short name among the runs that are compared.
        folder: RUN or RUN/eval/NAME.
        result: Its `result.json`.
    """

    label: str
    folder: Path
    result: dict[str, Any]

    @cached_property
    def evaluation(self) -> Path:
        """Where the predictions and pictures behind the result lie: `fit` puts them below the run."""
        below = self.folder / "eval" / str(self.result.get("split", ""))
        return below if (below / PREDICTIONS).is_file() and not (self.folder / PREDICTIONS).is_file() else self.folder

    @cached_property
    def training(self) -> Path:
        """Where the TensorBoard events of the training lie: an evaluation belongs to the run above it."""
        resolved = self.folder.resolve()
        return resolved.parents[1] if resolved.parent.name == "eval" else self.folder


def read_runs(folders: list[Path]) -> list[Finished]:
    """Read every run.

    Raises:
        UserError: If a folder is given twice, is no finished run, or its result is broken.
    """
    return [Finished(label, folder, read_result(folder)) for label, folder in labels_of(folders).items()]


def read_result(folder: Path) -> dict[str, Any]:
    """The result of a finished run.

    Raises:
        UserError: If there is no such run, it is not finished, or its result is broken or without metrics.
    """
    if not folder.is_dir():
        raise UserError(f"there is no run folder {folder}")
    run = RunFolder(folder)
    result = {key: value for key, value in run.read_result().items() if value is not None}
    if not result.get("metrics"):
        raise UserError(f"{run.result} has no metrics: predictions alone cannot be compared")
    groups = {"metrics": result["metrics"]}
    for key in ("arms", "differences"):
        parts = result.get(key, {})
        if not isinstance(parts, dict):
            raise UserError(f"{run.result}: {key} is not a JSON object")
        groups |= {f"{key}.{name}": values for name, values in parts.items()}
    for where, values in groups.items():
        for name, number in values.items() if isinstance(values, dict) else [("", None)]:
            value = number.get("value") if isinstance(number, dict) else None
            if not isinstance(value, int | float) or not math.isfinite(value):
                raise UserError(f"{run.result}: {where}.{name} has no value")
    return result


def labels_of(folders: list[Path]) -> dict[str, Path]:
    """A short unique name for each folder.

    Raises:
        UserError: If a folder is given twice.
    """
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise UserError("the same run is given twice")
    parts = [_parts(folder) for folder in folders]
    for depth in range(1, max(len(p) for p in parts) + 1):
        names = ["/".join(p[-depth:]) for p in parts]
        if len(set(names)) == len(names):
            return dict(zip(names, folders))
    return {str(folder.resolve()): folder for folder in folders}


def _parts(folder: Path) -> list[str]:
    """Parts of the path; `RUN/eval/NAME` counts as the one part `RUN:NAME`."""
    parts = list(folder.resolve().parts)
    if len(parts) > 3 and parts[-2] == "eval":
        parts[-3:] = [f"{parts[-3]}:{parts[-1]}"]
    return parts


def common_folder(folders: list[Path]) -> Path:
    """The run itself, or the folder that all runs lie in, relative to here where it can be.

    Raises:
        UserError: If the runs share nothing but the root of the disk.
    """
    if len(folders) == 1:
        return folders[0]
    try:
        common = Path(os.path.commonpath([folder.resolve() for folder in folders]))
    except ValueError:
        common = Path(folders[0].resolve().anchor)
    if common == Path(common.anchor):
        raise UserError("the runs lie in no common folder: say where to write with --csv and --json")
    here = Path.cwd()
    return common.relative_to(here) if common.is_relative_to(here) else common
