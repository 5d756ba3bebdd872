"""Records of finished runs, pooled over seeds, and where they come from."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from kvc.core.results import Value
from kvc.errors import UserError
from kvc.runs import PREDICTIONS, RunFolder

KEPT = ("seed", "machine", "versions", "timing", "git", "data", "base_model")
Record = dict[str, Any]
Item = dict[str, list[Record]]
"""The scores of one held-out item: name of an arm to those of its seeds, in order."""


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


def pool(
    folders: list[Path],
    label: Callable[[Path], str],
    own: Callable[[str, str], str | None],
    along: tuple[str, ...] = (),
) -> tuple[list[Item], list[Record]]:
    """One entry for each held-out item, with the scores of all arms by seed, and the sources.

    Args:
        folders: Runs.
        label: Name of what a run trained.
        own: The name under which an arm of a run is kept, from the run's label and the arm; None drops it.
        along: Keys of a record that the scores of its first arm, the method's, take along.

    Raises:
        UserError: If a run is not finished, or some arm was not measured on every item with every seed of it.
    """
    items: dict[tuple[str, int], dict[str, dict[int, Record]]] = {}
    sources = []
    for folder in folders:
        found, source = read_run(folder)
        name, seed = label(folder), source["seed"]
        if any(known["arm"] == name and known["seed"] == seed for known in sources):
            raise UserError(f"{folder}: a second run of '{name}' with the seed {seed}")
        sources.append({"arm": name, **source})
        for record in found:
            arms = items.setdefault((data_key(source), record["id"]), {})
            more: Record = {key: record[key] for key in along}
            for arm, scores in record["arms"].items():
                if (kept := own(name, arm)) is not None:
                    arms.setdefault(kept, {})[seed] = {**scores, **more}
                more = {}
    wanted = {name: set(seeds) for arms in items.values() for name, seeds in arms.items()}
    for arms in items.values():
        for name, seeds in wanted.items():
            if set(arms.get(name, {})) != seeds:
                raise UserError(f"'{name}' was not measured on all items: give runs on the same data for all arms")
    return [{name: [arms[name][seed] for seed in sorted(arms[name])] for name in wanted} for arms in items.values()], (
        sources
    )


def averaged(items: list[Item]) -> list[dict[str, Record]]:
    """Scores of each item, the mean over seeds: items are what intervals resample."""
    return [
        {
            name: {key: float(np.mean([one[key] for one in seeds])) for key in seeds[0] if np.isscalar(seeds[0][key])}
            for name, seeds in arms.items()
        }
        for arms in items
    ]


def cell(value: Value, digits: int = 3) -> str:
    """A number with its interval."""
    if value.low is None or value.high is None:
        return f"{value.value:.{digits}f}"
    return f"{value.value:.{digits}f} [{value.low:.{digits}f}, {value.high:.{digits}f}]"


def parse(about: str | None, argv: list[str] | None) -> argparse.Namespace:
    """The command line of a table over several runs: `runs`, `out` and `png`."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--png", type=Path)
    return parser.parse_args(argv)
