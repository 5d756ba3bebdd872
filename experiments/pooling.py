"""Records of finished runs, and where they come from."""

import argparse
import json
from pathlib import Path
from typing import Any

from kvc.errors import UserError
from kvc.runs import PREDICTIONS, RunFolder

KEPT = ("seed", "machine", "versions", "timing", "git", "data", "base_model")
Record = dict[str, Any]


def read_run(folder: Path) -> tuple[list[Record], Record]:
    """Records and provenance of one run.

    Raises:
        UserError: If the run is not finished.
    """
    run = RunFolder(folder)
    if not run.result.is_file():
        raise UserError(f"{folder}: not finished, there is no {run.result.name}")
    result = json.loads(run.result.read_text(encoding="utf-8"))
    path = next(path for path in (folder / PREDICTIONS, folder / "eval" / "test" / PREDICTIONS) if path.is_file())
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return records, {"run": folder.name, **{name: result[name] for name in KEPT if name in result}}


def data_key(source: Record) -> str:
    """What names the data of a run."""
    return json.dumps(source.get("data", {}), sort_keys=True)


def parse(about: str | None, argv: list[str] | None) -> argparse.Namespace:
    """The command line of a table over several runs: `runs`, `out` and `png`."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--png", type=Path)
    return parser.parse_args(argv)
