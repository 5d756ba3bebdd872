"""Runs cells on the slots of this machine, one process each."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass

from kvc.errors import UserError
from kvc.sweep.board import Board, Progress
from kvc.sweep.cells import Cell
from kvc.sweep.process import CellProcess
from kvc.sweep.slots import Pool, Slot, environment
from kvc.sweep.status import History
from kvc.sweep.stop import Stop

LOOK_EVERY = 0.1
NOTE_EVERY = 1.0


@dataclass
class _Running:
    progress: Progress
    process: CellProcess
    slots: list[Slot]
    noted: float = 0.0


class LocalExecutor:
    """A pool of slots, and at most one process on each.

    Args:
        slots: The slots.
        program: What each cell's words are given to; None is `python -m kvc`.
    """

    def __init__(self, slots: list[Slot], program: tuple[str, ...] | None = None) -> None:
        self.pool, self.program = Pool(slots), program
        self.running: list[_Running] = []

    @property
    def lanes(self) -> int:
        """Cells of one slot that can run at a time."""
        return len(self.pool.slots)

    def check(self, cells: list[Cell]) -> None:
        """Refuse cells that can never run here.

        Raises:
            UserError: If a cell takes more slots than there are.
        """
        for cell in cells:
            if not self.pool.fits(cell.slots):
                there = len({slot.name for slot in self.pool.slots})
                raise UserError(f"cell {cell.name}: gpus_per_cell: {cell.slots} slots, but there are {there}")

    def run(self, board: Board, history: History, stop: Stop) -> None:
        """Run what is left to run, until all is settled or it is asked to stop."""
        asked = 0
        try:
            while True:
                self._reap(board, stop.times > 0)
                if stop.times > asked:
                    asked = stop.times
                    self._end_all(history, asked > 1)
                waiting = [] if asked else board.ready()
                for progress in waiting:
                    self._start(board, history, progress)
                history.update(board)
                if not self.running and (asked or not board.ready()):
                    history.update(board)
                    return
                time.sleep(LOOK_EVERY)
        finally:
            for item in self.running:
                item.process.kill()

    def _start(self, board: Board, history: History, progress: Progress) -> None:
        slots = self.pool.take(progress.cell.slots)
        if not slots:
            return
        where = "slot " + ",".join(slot.name for slot in slots)
        words, look = board.start(progress, where)
        if look.state == "stale":
            history.say(f"{progress.cell.name} is stale and is made again ({look.why})")
        env = environment(slots, len(self.pool.slots), os.environ)
        process = CellProcess(words, env, board.disk.log(progress.cell), self.program)
        self.running.append(_Running(progress, process, slots))

    def _reap(self, board: Board, stopping: bool) -> None:
        for item in list(self.running):
            code = item.process.poll()
            if code is not None:
                self.running.remove(item)
                self.pool.give(item.slots)
                board.finish(item.progress, code, item.process.tail(), stopping)
            elif time.monotonic() - item.noted > NOTE_EVERY:
                item.noted = time.monotonic()
                item.progress.note = "".join(item.process.tail(1))

    def _end_all(self, history: History, now: bool) -> None:
        end: Callable[[CellProcess], None] = CellProcess.kill if now else CellProcess.terminate
        how = "killing" if now else "stopping (once more kills them)"
        history.say(f"interrupted: {how} {len(self.running)} running cells, starting none")
        for item in self.running:
            end(item.process)
