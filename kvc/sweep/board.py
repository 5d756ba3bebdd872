"""Where every cell of a running sweep stands."""

import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

from kvc.sweep.cells import Cell
from kvc.sweep.state import Disk, Look

Status = Literal["waiting", "running", "done", "failed", "skipped", "interrupted"]
ENDED = {"done", "failed", "skipped", "interrupted"}


@dataclass
class Progress:
    """Where one cell stands.

    Attributes:
        cell: The cell.
        status: Its status.
        fresh: Whether this sweep ran it; else it was done before.
        where: Slot or job.
        note: The last line of its log, or why it ended.
        started: Seconds on the monotonic clock; 0 before.
        ended: The same.
        tail: Last lines of the log of a failed cell.
        looked: Whether its needs are done and it was found not to be.
    """

    cell: Cell
    status: Status = "waiting"
    fresh: bool = False
    where: str = ""
    note: str = ""
    started: float = 0.0
    ended: float = 0.0
    tail: list[str] = field(default_factory=list)
    looked: bool = False

    def seconds(self) -> float:
        """Time that it has run."""
        return (self.ended or time.monotonic()) - self.started if self.started else 0.0


class Board:
    """All cells and what may happen next.

    Args:
        cells: Each after those that it needs.
        disk: Their state on disk.
    """

    def __init__(self, cells: list[Cell], disk: Disk) -> None:
        self.disk = disk
        self.cells = {cell.name: Progress(cell) for cell in cells}
        self.events: list[Progress] = []

    def of(self, status: Status) -> list[Progress]:
        """Cells of one status."""
        return [progress for progress in self.cells.values() if progress.status == status]

    def counts(self) -> Counter[str]:
        """Number of cells by status."""
        return Counter(progress.status for progress in self.cells.values())

    def ready(self) -> list[Progress]:
        """Waiting cells whose needs are done and that are not done themselves; what is settled leaves the queue."""
        found = []
        for progress in self.of("waiting"):
            needs = [self.cells[name] for name in progress.cell.needs]
            if blocked := [need.cell.name for need in needs if need.status in {"failed", "skipped"}]:
                self._end(progress, "skipped", f"needs {blocked[0]}")
            elif all(need.status == "done" for need in needs):
                if not progress.looked and self.disk.look(progress.cell).state == "done":
                    self._end(progress, "done", "was done before")
                else:
                    progress.looked = True
                    found.append(progress)
        return found

    def start(self, progress: Progress, where: str) -> tuple[list[str], Look]:
        """Mark a cell as running; returns the words to run it with, and the state that it was found in."""
        look = self.disk.look(progress.cell)
        progress.status, progress.fresh, progress.where = "running", True, where
        progress.started, progress.note = time.monotonic(), ""
        self.events.append(progress)
        return words_of(progress.cell, look), look

    def finish(self, progress: Progress, code: int, tail: list[str], stopping: bool) -> None:
        """Judge a cell that has ended by what is on disk: SIGTERM lets some programs exit with 0."""
        cell = progress.cell
        by_code = cell.plan.config is None
        fine = code == 0 if by_code else self.disk.look_at_result(cell).state == "done"
        if fine:
            self.disk.write(cell)
            self._end(progress, "done", "")
        elif stopping:
            self._end(progress, "interrupted", "the next sweep goes on with it")
        else:
            progress.tail = tail
            how = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
            self._end(progress, "failed", f"{how}, but no result" if code == 0 else how)

    def _end(self, progress: Progress, status: Status, note: str) -> None:
        progress.status, progress.note, progress.ended = status, note, time.monotonic()
        self.events.append(progress)


def words_of(cell: Cell, look: Look) -> list[str]:
    """The command line of a cell as it was found: what is stale is replaced, what was begun goes on."""
    return [*cell.argv, *(cell.plan.overwrite if look.state == "stale" else ())]
