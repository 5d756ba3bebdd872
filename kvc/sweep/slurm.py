"""Runs cells under SLURM through submitit: an array for each level of needs, time-outs requeue and resume."""

import os
import signal
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvc.errors import UserError
from kvc.sweep import process
from kvc.sweep.board import Board, Progress, words_of
from kvc.sweep.cells import Cell
from kvc.sweep.process import CellProcess, tail
from kvc.sweep.slots import NOT_INHERITED
from kvc.sweep.state import Disk
from kvc.sweep.status import History
from kvc.sweep.stop import Stop

CLUSTERS = ("slurm", "local")
DEFAULTS: dict[str, Any] = {"cluster": "slurm", "timeout_min": 240, "max_num_timeout": 20}
PLAIN = ("timeout_min", "cpus_per_task", "mem_gb", "nodes", "gpus_per_node")
"""Parameters that submitit knows for every cluster; others are SLURM's own."""
LOOK_EVERY = 0.5
JOB_LIMIT = 1000


def parse_parameters(words: list[str]) -> dict[str, Any]:
    """`KEY=VALUE` words as parameters; numbers become numbers.

    Raises:
        UserError: If a word is no `KEY=VALUE`.
    """
    parameters: dict[str, Any] = {}
    for word in words:
        key, separator, value = word.partition("=")
        if not (key.isidentifier() and separator and value):
            raise UserError(f"--slurm {word}: write KEY=VALUE")
        parameters[key] = _number(value)
    return parameters


def _number(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


class CellJob:
    """What a job runs: the cell's command in a process of its own, stopped and requeued when time is up.

    It is pickled by submitit, with the checkpoint protocol: `checkpoint` is called in the signal handler of a job whose
    time is nearly up or that is preempted.

    Args:
        root: Folder of the sweep.
        cells: All cells of the sweep, for the state of what a cell needs.
        cwd: Folder that the commands run in.
        program: What each cell's words are given to; None is `python -m kvc`.
    """

    def __init__(self, root: Path, cells: list[Cell], cwd: Path, program: tuple[str, ...] | None = None) -> None:
        self.root, self.cells, self.cwd, self.program = root, cells, cwd, program
        self.process: CellProcess | None = None

    def __call__(self, name: str) -> int:
        """Run one cell to its end.

        Args:
            name: Its name.

        Returns:
            Exit code of the command.
        """
        os.chdir(self.cwd)
        disk = Disk(self.root, self.cells)
        cell = disk.cells[name]
        look = disk.look(cell)
        if look.state == "done":
            return 0
        # The state is read here, not at submission: after a requeue what was begun goes on instead of being replaced.
        env = cell_environment(os.environ)
        # SLURM warns every process of the job; the cell must wait for this one to tell it.
        deaf = (signal.SIGUSR1, signal.SIGUSR2)
        self.process = CellProcess(words_of(cell, look), env, disk.log(cell), self.program, deaf)
        try:
            while (code := self.process.poll()) is None:
                time.sleep(LOOK_EVERY)
            return code
        finally:
            self.process.kill()

    def checkpoint(self, name: str) -> Any:
        """Let the cell save its work and end; the same job, queued again, goes on from there."""
        from submitit.helpers import DelayedSubmission

        if self.process is not None:
            self.process.terminate()
            # This is a signal handler: waiting for the process would wait for a lock that the interrupted code holds.
            while not self.process.ended():
                time.sleep(0.05)
        return DelayedSubmission(CellJob(self.root, self.cells, self.cwd, self.program), name)


def cell_environment(inherited: Mapping[str, str]) -> dict[str, str]:
    """A job's variables without those of SLURM, by which Lightning would take the cell for a task of its own."""
    env = {key: value for key, value in inherited.items() if not key.startswith(NOT_INHERITED)}
    return {**env, "PYTHONUNBUFFERED": "1"}


class SlurmExecutor:
    """Submits every level of needs as one array.

    Args:
        folder: Where submitit keeps its files.
        parameters: Of submitit, beside `cluster`; see `DEFAULTS`.
        program: What each cell's words are given to; None is `python -m kvc`.
    """

    def __init__(self, folder: Path, parameters: dict[str, Any], program: tuple[str, ...] | None = None) -> None:
        self.folder, self.program = folder, program or process.PROGRAM
        self.parameters = {**DEFAULTS, **parameters}
        self.jobs: dict[str, Any] = {}

    @property
    def lanes(self) -> int:
        """Cells that may run at a time."""
        return int(self.parameters.get("array_parallelism", JOB_LIMIT))

    def check(self, cells: list[Cell]) -> None:
        """Make an executor without submitting anything.

        Raises:
            UserError: If submitit or SLURM is missing, or a parameter is wrong.
        """
        if self.parameters["cluster"] not in CLUSTERS:
            raise UserError(f"--slurm cluster={self.parameters['cluster']}: there are {', '.join(CLUSTERS)}")
        with tempfile.TemporaryDirectory() as folder:
            for gpus in {cell.slots for cell in cells}:
                self._executor(gpus, Path(folder))

    def run(self, board: Board, history: History, stop: Stop) -> None:
        """Submit what is left to run, level by level, and watch it."""
        job = CellJob(board.disk.root, list(board.disk.cells.values()), Path.cwd(), self.program)
        asked = 0
        while True:
            self._reap(board, stop.times > 0)
            if stop.times > asked:
                asked = stop.times
                history.say(f"interrupted: cancelling {len(self.jobs)} jobs (once more does not wait for their end)")
                for submitted in self.jobs.values():
                    submitted.cancel()
            waiting = [] if asked or self.jobs else board.ready()
            if waiting:
                self._submit(board, history, job, waiting)
            history.update(board)
            if asked > 1 or (not self.jobs and (asked or not board.ready())):
                history.update(board)
                return
            time.sleep(LOOK_EVERY)

    def _submit(self, board: Board, history: History, job: CellJob, waiting: list[Progress]) -> None:
        """One array for the cells of each number of GPUs."""
        for gpus in sorted({progress.cell.slots for progress in waiting}):
            level = [progress for progress in waiting if progress.cell.slots == gpus]
            names = [progress.cell.name for progress in level]
            jobs = self._executor(gpus, self.folder / "%j").map_array(job, names)
            for progress, submitted in zip(level, jobs):
                _, look = board.start(progress, f"job {submitted.job_id}")
                if look.state == "stale":
                    history.say(f"{progress.cell.name} is stale and is made again ({look.why})")
                self.jobs[progress.cell.name] = submitted

    def _reap(self, board: Board, stopping: bool) -> None:
        from submitit.core.utils import FailedJobError, UncompletedJobError

        for name, job in list(self.jobs.items()):
            progress = board.cells[name]
            log = board.disk.log(progress.cell)
            if not job.done():
                progress.note = f"{job.state.lower()} {''.join(tail(log, count=1))}".strip()
                continue
            del self.jobs[name]
            try:
                code, last = int(job.result()), tail(log)
            except (FailedJobError, UncompletedJobError) as error:
                code, last = 1, [*tail(log), *str(error).strip().splitlines()[-3:]]
            board.finish(progress, code, last, stopping)

    def _executor(self, gpus: int, folder: Path) -> Any:
        """An executor of submitit for cells that take so many GPUs."""
        try:
            import submitit
        except ImportError:
            raise UserError("--executor slurm needs the extra: pip install -e '.[slurm]'") from None
        given = {"gpus_per_node": gpus, **self.parameters}
        cluster = given.pop("cluster")
        if cluster == "slurm":
            given["additional_parameters"] = {"requeue": True}
        timeouts = {f"{cluster}_max_num_timeout": given.pop("max_num_timeout")}
        try:
            executor = submitit.AutoExecutor(folder=folder, cluster=cluster, **timeouts)
            own = {key if key in PLAIN else f"{cluster}_{key}": value for key, value in given.items()}
            executor.update_parameters(name="kvc-sweep", **own)
        except (ValueError, NameError, TypeError, RuntimeError, AssertionError) as error:
            raise UserError(f"--slurm: {' '.join(str(error).split())[:300]}") from error
        return executor
