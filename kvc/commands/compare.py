"""`python -m kvc compare`: finished runs as a table, as CSV and as JSON."""

import argparse
import csv
import io
import os
from pathlib import Path
from typing import Any

from kvc.commands import CommandParser
from kvc.errors import UserError

EPILOG = """\
examples:
  python -m kvc compare runs/first
  python -m kvc compare runs/first runs/second runs/third
  python -m kvc compare runs/first/eval/test runs/first/eval/other
  python -m kvc compare runs/* --metric exact_match --csv table.csv

The table shows the key metrics; CSV (one number a line) and JSON hold all.
Runs that differ only in the seed are also averaged.
"""
WRITTEN = ("compare.csv", "compare.json")
HEADER = ["run", "path", "method", "arm", "seed", "kind", "metric", "value", "low", "high", "n"]


def parser() -> argparse.ArgumentParser:
    """Arguments of the command."""
    result = CommandParser(
        prog="python -m kvc compare",
        description="Compare finished runs, their baselines and paired differences.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument("runs", metavar="RUN", nargs="+", help="run folder, or evaluation folder RUN/eval/NAME")
    result.add_argument(
        "--metric", metavar="NAME", nargs="+", action="extend", help="metrics to show; default: the key metrics"
    )
    result.add_argument("--csv", metavar="FILE", help="default: compare.csv in the run, or in the runs' common folder")
    result.add_argument("--json", metavar="FILE", help="default: compare.json there")
    return result


def main(argv: list[str]) -> int:
    """Print the tables and write the files.

    Args:
        argv: Arguments after `compare`.

    Returns:
        Exit code.
    """
    options = parser().parse_args(argv)
    from rich.console import Console

    from kvc.core.files import write_json, write_text
    from kvc.report.table import show

    # `runs/*` also names what an earlier comparison wrote there.
    folders = [path for path in map(Path, options.runs) if path.name not in WRITTEN or not path.is_file()]
    if not folders:
        raise UserError(f"{options.runs[0]} is not a run folder")
    labels = labels_of(folders)
    results = {label: read(folder) for label, folder in labels.items()}
    known = {name for result in results.values() for name in [*result["metrics"], *result.get("differences", {})]}
    for name in options.metric or []:
        if name not in known:
            raise UserError(f"--metric {name}: no run has it; there are {', '.join(sorted(known))}")
    csv_path = Path(options.csv) if options.csv else common_folder(folders) / WRITTEN[0]
    json_path = Path(options.json) if options.json else common_folder(folders) / WRITTEN[1]
    show(results, options.metric, Console())
    try:
        write_text(csv_path, as_csv(results, labels))
        write_json(json_path, as_json(results, labels))
    except OSError as error:
        raise UserError(f"cannot write {csv_path} and {json_path}: {error.strerror}") from error
    print(f"wrote {csv_path} and {json_path}")
    return 0


def read(folder: Path) -> dict[str, Any]:
    """The result of a finished run.

    Raises:
        UserError: If there is no such run, it is not finished, or its result is broken or without metrics.
    """
    from kvc.runs import RunFolder

    if not folder.is_dir():
        raise UserError(f"there is no run folder {folder}")
    run = RunFolder(folder)
    try:
        result = run.read_result()
    except UnicodeDecodeError as error:
        raise UserError(f"{run.result} is not UTF-8 text: {error.reason}") from error
    if not result.get("metrics"):
        raise UserError(f"{run.result} has no metrics: predictions alone cannot be compared")
    groups = {"metrics": result["metrics"]}
    groups |= {f"arms.{arm}": values for arm, values in (result.get("arms") or {}).items()}
    groups |= {f"differences.{metric}": arms for metric, arms in (result.get("differences") or {}).items()}
    for where, values in groups.items():
        for name, number in values.items() if isinstance(values, dict) else [("", None)]:
            if not isinstance(number, dict) or not isinstance(number.get("value"), int | float):
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


def as_csv(results: dict[str, dict[str, Any]], labels: dict[str, Path]) -> str:
    """Every number on a line of its own."""
    from kvc.report.table import seed_groups

    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(HEADER)

    def add(start: list[Any], arm: str, seed: Any, kind: str, values: dict[str, Any]) -> None:
        for name, number in values.items():
            table.writerow([*start, arm, seed, kind, name, *(number.get(k) for k in ("value", "low", "high", "n"))])

    for run, result in results.items():
        start, seed = [run, str(labels[run]), result.get("method")], result.get("seed")
        add(start, "", seed, "metric", result["metrics"])
        for key, part in (("trainable_parameters", "sizes"), ("fit_seconds", "timing")):
            if key in result.get(part, {}):
                add(start, "", seed, part, {key: {"value": result[part][key]}})
        for arm, values in result.get("arms", {}).items():
            add(start, arm, seed, "metric", values)
        for metric, arms in result.get("differences", {}).items():
            for arm, number in arms.items():
                add(start, arm, seed, "difference", {metric: number})
    for group in seed_groups(results):
        start, seeds = [" ".join(group.runs), "", results[group.runs[0]].get("method")], " ".join(map(str, group.seeds))
        for arm, values in group.metrics.items():
            add(start, arm, seeds, "metric, mean over seeds", values)
        for metric, arms in group.differences.items():
            for arm, number in arms.items():
                add(start, arm, seeds, "difference, mean over seeds", {metric: number})
    return text.getvalue()


def as_json(results: dict[str, dict[str, Any]], labels: dict[str, Path]) -> dict[str, Any]:
    """Everything that was measured, the means over seeds, and what does not compare."""
    from dataclasses import asdict

    from kvc.report.table import mismatches, seed_groups

    measured = ["samples", "headline", "metrics", "arms", "differences"]
    keys = ["method", "seed", "identity", *measured, "sizes", "timing", "base_model", "data"]
    return {
        "schema": 1,
        "runs": [
            {"run": run, "path": str(labels[run]), **{k: result[k] for k in keys if k in result}}
            for run, result in results.items()
        ],
        "seeds": [asdict(group) for group in seed_groups(results)],
        "warnings": mismatches(results),
    }
