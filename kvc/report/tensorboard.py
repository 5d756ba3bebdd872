"""A comparison for TensorBoard: one HParams entry a run with its final metrics, the curves, and the plots."""

import json
import math
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvc.errors import UserError
from kvc.report.folder import Finished
from kvc.report.plots import Drawing
from kvc.report.settings import differing, say
from kvc.runs import RESULT

NOTE = "comparison.json"
"""Lies in the folder, so that a later comparison may replace it and nothing else."""


def check_folder(folder: Path) -> None:
    """Refuse to write where something else lies.

    Raises:
        UserError: If the folder holds anything but an earlier comparison.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--tensorboard {folder}: that is a file, not a folder")
    ours = (folder / NOTE).is_file() and not (folder / RESULT).exists()
    if folder.is_dir() and any(folder.iterdir()) and not ours:
        raise UserError(f"--tensorboard {folder}: the folder is not empty and holds no earlier comparison")


def write_tensorboard(folder: Path, runs: Sequence[Finished], drawing: Drawing) -> None:
    """Write everything beside the folder, then put it in its place.

    Args:
        folder: What `tensorboard --logdir` shall show; an earlier comparison there is replaced.
        runs: The runs.
        drawing: Their plots and learning curves.

    Raises:
        UserError: If the folder holds anything but an earlier comparison.
    """
    check_folder(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        _write(temporary, runs, drawing)
        temporary.chmod(0o755)
        if folder.exists():
            shutil.rmtree(folder)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def hparams_of(runs: Sequence[Finished]) -> dict[str, dict[str, Any]]:
    """What distinguishes the runs: label to setting to value, the same settings with the same type for all.

    TensorBoard's table has one type a column, so a setting that is not a number everywhere is text everywhere.
    """
    results = {run.label: run.result for run in runs}
    columns = {
        "method": {run: result.get("method") for run, result in results.items()},
        "seed_everything": {run: result.get("seed") for run, result in results.items()},
        **differing(results),
    }
    table: dict[str, dict[str, Any]] = {run: {} for run in results}
    for key, values in columns.items():
        for kind in (bool, (int, float)):
            if all(
                isinstance(value, kind) and (kind is bool or not isinstance(value, bool)) for value in values.values()
            ):
                break
        else:
            values = {run: say(value) for run, value in values.items()}
        for run, value in values.items():
            table[run][key] = value
    return table


def folders_of(labels: Sequence[str]) -> list[str]:
    """A relative folder for each label: `RUN:NAME` becomes `RUN_NAME`, longer where two would be the same."""
    places: list[str] = []
    for label in labels:
        plain = label.strip("/").replace(":", "_") or "run"
        while plain in places:
            plain += "_"
        places.append(plain)
    return places


def _write(folder: Path, runs: Sequence[Finished], drawing: Drawing) -> None:
    from torch.utils import tensorboard
    from torch.utils.tensorboard import summary

    open_writer: Any = tensorboard.SummaryWriter  # its annotations are incomplete
    hparams: Any = summary.hparams
    table = hparams_of(runs)
    finals = {run.label: _finals(run) for run in runs}
    every = {name: 0.0 for metrics in finals.values() for name in metrics}
    writer = open_writer(str(folder))
    # One description of the experiment for all runs, with every metric that any of them has.
    experiment = hparams(next(iter(table.values()), {}), every)[0]
    writer.file_writer.add_summary(experiment)
    for name, figure in drawing.figures.items():
        writer.add_figure(name, figure, close=False)
    writer.close()
    for run, place in zip(runs, folders_of([run.label for run in runs])):
        writer = open_writer(str(folder / place))
        _, start, end = hparams(table[run.label], finals[run.label])
        writer.file_writer.add_summary(start)
        writer.file_writer.add_summary(end)
        for name, value in finals[run.label].items():
            writer.add_scalar(name, value)
        for tag, lines in drawing.curve_values.items():
            for step, value in lines.get(run.label, []):
                writer.add_scalar(tag, value, step)
        writer.close()
    note = {"runs": {run.label: str(run.folder) for run in runs}}
    (folder / NOTE).write_text(json.dumps(note, indent=2) + "\n", encoding="utf-8")


def _finals(run: Finished) -> dict[str, float]:
    return {
        f"final/{name}": float(number["value"])
        for name, number in run.result["metrics"].items()
        if math.isfinite(number["value"])
    }
