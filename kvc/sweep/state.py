"""What the disk says about a cell: done, begun, out of date or missing."""

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from kvc.core.files import digest, digest_files, write_json
from kvc.errors import UserError
from kvc.runs import RunFolder, differences, identity_hash
from kvc.sweep.cells import Cell

HOME = ".sweep"
"""Folder inside that of the sweep for logs and records; hidden, so that `runs/NAME/*` names runs only."""

State = Literal["done", "missing", "begun", "stale"]


@dataclass(frozen=True)
class Look:
    """State of a cell and the reason, if it needs one."""

    state: State
    why: str = ""


class Disk:
    """Reads the state of cells, and keeps a record of those that were run.

    A cell with a run folder is done if `result.json` is there and has the identity that its configuration has now. Any
    other command is done if it was run with the same words on the same results. What such a command has made again
    makes the cells that need it stale, for their configurations only name its files.

    Args:
        root: Folder of the sweep.
        cells: All cells.
    """

    def __init__(self, root: Path, cells: list[Cell]) -> None:
        self.root = root
        self.cells = {cell.name: cell for cell in cells}

    def log(self, cell: Cell) -> Path:
        """Where the output of a cell goes."""
        return self.root / HOME / "logs" / f"{cell.name}.log"

    def record(self, cell: Cell) -> Path:
        """Where it is written down that a cell was run to its end."""
        return self.root / HOME / "done" / f"{cell.name}.json"

    def look(self, cell: Cell) -> Look:
        """The state of a cell; those that it needs must be done for it to be final."""
        if cell.plan.config is None:
            return self._look_at_record(cell)
        look = self.look_at_result(cell)
        before, now = self._read(cell).get("needs", {}), self._needs(cell)
        made_again = [name for name in now if self._by_record(name) and before.get(name, now[name]) != now[name]]
        return Look("stale", f"{made_again[0]} was run again") if made_again and look.state == "done" else look

    def look_at_result(self, cell: Cell) -> Look:
        """The state of a cell with a run folder, by that folder alone."""
        run, config = RunFolder(cell.folder), cell.plan.config
        assert config is not None
        if cell.plan.trained is not None:
            try:
                config = {**config, "checkpoint": digest_files(RunFolder(cell.plan.trained).best())}
            except UserError:
                return Look("missing", "its run is not trained yet")
        if not run.config.is_file():
            return Look("missing")
        try:
            if changed := differences(run.read_config(), config):
                return Look("stale", "; ".join(changed[:3]))
            if not run.result.is_file():
                return Look("begun", "goes on from its checkpoint" if run.last.is_file() else "")
            if run.read_result().get("identity") != identity_hash(config):
                return Look("stale", "its result belongs to another configuration")
        except UserError as error:
            return Look("stale", str(error))
        return Look("done")

    def write(self, cell: Cell) -> None:
        """Write down that a cell was run to its end."""
        when = datetime.now(UTC).isoformat(timespec="milliseconds")
        write_json(self.record(cell), {"argv": list(cell.argv), "needs": self._needs(cell), "finished": when})

    def _look_at_record(self, cell: Cell) -> Look:
        record = self._read(cell)
        if not record:
            return Look("missing")
        if record.get("argv") != list(cell.argv):
            return Look("stale", "its command line has changed")
        before, now = record.get("needs", {}), self._needs(cell)
        if changed := [name for name in now if before.get(name) != now[name]]:
            return Look("stale", f"{changed[0]} was run again")
        return Look("done")

    def _needs(self, cell: Cell) -> dict[str, str]:
        """By needed cell, the digest of what it left."""
        return {name: self._mark(self.cells[name]) for name in cell.needs}

    def _mark(self, cell: Cell) -> str:
        path = self.record(cell) if cell.plan.config is None else RunFolder(cell.folder).result
        return digest_files(path) if path.is_file() else digest(None)

    def _by_record(self, name: str) -> bool:
        return self.cells[name].plan.config is None

    def _read(self, cell: Cell) -> dict[str, Any]:
        try:
            record = json.loads(self.record(cell).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return record if isinstance(record, dict) else {}
