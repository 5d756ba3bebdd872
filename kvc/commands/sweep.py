"""`python -m kvc sweep`: many runs from one grid file, on the slots of this machine or under SLURM."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from kvc.commands import CommandParser
from kvc.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from kvc.sweep.board import Board
    from kvc.sweep.cells import Cell
    from kvc.sweep.state import Disk
    from kvc.sweep.status import History

EPILOG = """\
grid file (paths are relative to it):
  base: ../configs/comp/tiny.yaml          configuration files, one or a list
  set: {trainer.max_epochs: 2}             settings of every cell
  axes:                                    every combination is a cell
    model.init_args.optim.lr: [0.001, 0.01]
    size: [{name: small, set: {...}}]      a value that sets several keys, or base: FILE
  seeds: [42, 43]                          one more axis
  exclude: [{size: small, seed: 43}]       include: [{model.init_args.optim.lr: 0.1}]
  require: [budget > window + prefix]      keeps the combinations that meet it; sums of settings and numbers
  random: {count: 1024, seed: 42}          draws so many of what is left; a larger count adds to a smaller one
  command: fit                             any command; gpus_per_cell: 2; args: [...] for positional words
  stages: {train: {...}, evaluate: {command: test, each: train, set: {run: "{train.run_dir}"}}}
                                           several such blocks; needs: [STAGE] waits, each: STAGE makes a cell for each
  verify: true                             marks a stage that --no-verify leaves out
  {run_dir}  {STAGE.run_dir}  {STAGE.run_dirs}   folders of the cell, of the cell that it needs, of all that it needs

examples:
  python -m kvc sweep experiments/sweep_tiny.yaml --dry-run
  python -m kvc sweep experiments/sweep_tiny.yaml --slots cpu:2
  python -m kvc sweep grid.yaml --slots 0,1,2,3
  python -m kvc sweep grid.yaml --only 'train/*seed=42'
  python -m kvc sweep experiments/rkv_budgets.yaml --no-verify
  python -m kvc sweep grid.yaml --executor slurm --slurm timeout_min=240 partition=gpu cpus_per_task=8

Runs lie in runs/GRID/CELL, logs in runs/GRID/.sweep/logs. The same command again runs what is missing, begun or stale.
Ctrl-C lets the running cells save their work; a second one kills them.
"""


def parser() -> argparse.ArgumentParser:
    """Arguments of the command."""
    result = CommandParser(
        prog="python -m kvc sweep",
        description="Run every cell of a grid file that is not done yet.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = result.add_argument
    add("grid", metavar="GRID_FILE", type=Path, help="YAML file")
    add("--slots", metavar="SLOTS", help="0,1,2,3 (GPU ids) or cpu:N; default: every visible GPU, else cpu:1")
    add("--root", metavar="DIR", type=Path, help="folder of the sweep; default: runs/NAME_OF_THE_GRID")
    add("--only", metavar="PATTERN", help="only cells whose names match (*, ?), and what they need")
    add("--no-verify", dest="no_verify", action="store_true", help="leave out the stages with verify: true")
    add("--dry-run", dest="dry_run", action="store_true", help="show the cells and their commands, run nothing")
    add("--executor", choices=("local", "slurm"), default="local", help="where cells run (default: local)")
    add(
        "--slurm",
        metavar="KEY=VALUE",
        nargs="+",
        action="extend",
        default=[],
        help="parameters of submitit, e.g. timeout_min=240 partition=gpu; cluster=local tries it without SLURM",
    )
    return result


def main(argv: list[str]) -> int:
    """Run the sweep.

    Args:
        argv: Arguments after `sweep`.

    Returns:
        0 if every cell is done, 1 if one failed, 130 if interrupted.

    Raises:
        UserError: If the grid, a cell's command line or the slots are wrong; nothing has been started then.
    """
    options = parser().parse_args(argv)
    from rich.console import Console

    from kvc.__main__ import COMMANDS, TRAINER_COMMANDS
    from kvc.runs import RUNS, lock_folder
    from kvc.sweep.board import Board
    from kvc.sweep.cells import make_cells, plan_cells
    from kvc.sweep.grid import read_grid, without_verification
    from kvc.sweep.local import LocalExecutor
    from kvc.sweep.slots import parse_slots, visible_gpus
    from kvc.sweep.slurm import SlurmExecutor, parse_parameters
    from kvc.sweep.state import HOME, Disk
    from kvc.sweep.status import History, Lines, Screen
    from kvc.sweep.stop import Stop

    grid = read_grid(options.grid, TRAINER_COMMANDS, [name for name in COMMANDS if name != "sweep"])
    grid = without_verification(grid) if options.no_verify else grid
    root = options.root or RUNS / grid.name
    cells = _only(make_cells(grid, root, TRAINER_COMMANDS), options.only)
    parameters = parse_parameters(options.slurm)
    executor: LocalExecutor | SlurmExecutor
    if options.executor == "slurm":
        if options.slots is not None:
            raise UserError("--slots is for --executor local: SLURM chooses the GPUs")
        executor = SlurmExecutor(root / HOME / "slurm", parameters)
    else:
        if parameters:
            raise UserError("--slurm needs --executor slurm")
        executor = LocalExecutor(parse_slots(options.slots, [] if options.slots else visible_gpus()))
    executor.check(cells)
    from kvc.planning import plan

    cells = plan_cells(grid, cells, plan)
    disk = Disk(root, cells)
    console = Console()
    if options.dry_run:
        _print_cells(cells, disk, console)
        return 0
    lock = lock_folder(root)
    board = Board(cells, disk)
    view = Screen(console, executor.lanes) if console.is_terminal else Lines(console, executor.lanes)
    history = History(root / HOME / "sweep.log", view)
    stop = Stop()
    try:
        with stop.watching():
            history.say(f"{grid.path}: {len(cells)} cells, {executor.lanes} at a time, into {root}")
            executor.run(board, history, stop)
    finally:
        view.close()
        lock.close()
    return _conclude(board, history, stop.times > 0)


def _only(cells: "list[Cell]", pattern: str | None) -> "list[Cell]":
    """Cells whose names match, and what they need."""
    from fnmatch import fnmatchcase

    if pattern is None:
        return cells
    wanted = {cell.name for cell in cells if fnmatchcase(cell.name, pattern)}
    if not wanted:
        raise UserError(f"--only {pattern}: no cell has such a name; --dry-run lists them")
    for cell in reversed(cells):
        if cell.name in wanted:
            wanted.update(cell.needs)
    return [cell for cell in cells if cell.name in wanted]


def _print_cells(cells: "list[Cell]", disk: "Disk", console: "Console") -> None:
    """Every cell with its state, what it waits for, and its command."""
    import shlex

    done = set()
    for cell in cells:
        look = disk.look(cell)
        # What a cell needs may change what it finds.
        waits = [name for name in cell.needs if name not in done]
        if look.state == "done" and not waits:
            done.add(cell.name)
        state = f"waits for {waits[0]}" if waits else f"{look.state}{f': {look.why}' if look.why else ''}"
        console.print(f"{cell.name}  [{state}]", markup=False, highlight=False, soft_wrap=True)
        needs = ", ".join(cell.needs[:3]) + (f" and {len(cell.needs) - 3} more" if len(cell.needs) > 3 else "")
        if needs:
            console.print(f"    needs {needs}", markup=False, highlight=False, soft_wrap=True)
        words = shlex.join(["python", "-m", "kvc", *cell.argv])
        console.print(f"    {words}", markup=False, highlight=False, soft_wrap=True)
    console.print(f"{len(cells)} cells; nothing was started", highlight=False)


def _conclude(board: "Board", history: "History", interrupted: bool) -> int:
    """Print what failed, with the ends of the logs; returns the exit code."""
    from kvc.sweep.status import summary

    failed = board.of("failed")
    for progress in failed:
        log = board.disk.log(progress.cell)
        history.view.say(f"\n{progress.cell.name} failed: {progress.note}; the end of {log}:")
        for line in progress.tail:
            history.view.say(f"  {line}")
    for progress in board.of("skipped"):
        history.view.say(f"{progress.cell.name} was skipped: {progress.note}")
    history.say(f"sweep ended: {summary(board, lanes=0)}")
    if interrupted:
        history.view.say("interrupted; the same command goes on")
        return 130
    return 1 if failed else 0
