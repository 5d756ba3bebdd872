"""What a person sees of a running sweep: a live table on a terminal, lines elsewhere, and a history on disk."""

import time
from datetime import timedelta
from pathlib import Path
from typing import Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from kvc.sweep.board import ENDED, Board, Progress

STYLES = {
    "waiting": "dim",
    "running": "bold cyan",
    "done": "green",
    "failed": "bold red",
    "skipped": "yellow",
    "interrupted": "yellow",
}
ORDER = ("failed", "running", "interrupted", "skipped", "waiting", "done")
"""What is shown first where not all cells fit."""


class View(Protocol):
    """Shows a board."""

    def update(self, board: Board) -> None:
        """Show what has happened."""

    def say(self, text: str) -> None:
        """Show a sentence."""

    def close(self) -> None:
        """Leave the terminal in order."""


class History:
    """Appends what happens to `sweep.log`, and hands it to a view.

    Args:
        path: The file.
        view: Where it is shown as well.
    """

    def __init__(self, path: Path, view: View) -> None:
        self.path, self.view = path, view
        path.parent.mkdir(parents=True, exist_ok=True)

    def say(self, text: str) -> None:
        """Write and show a sentence."""
        self._write(text)
        self.view.say(text)

    def update(self, board: Board) -> None:
        """Write the events of the board, show it, and forget them."""
        for event in board.events:
            self._write(line(event))
        self.view.update(board)
        board.events.clear()

    def _write(self, text: str) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")


def line(progress: Progress) -> str:
    """One event in words."""
    name, note = progress.cell.name, f": {progress.note}" if progress.note else ""
    if progress.status == "running":
        return f"{name} started on {progress.where}{note}"
    took = f" after {clock(progress.seconds())}" if progress.started else ""
    return f"{name} {progress.status}{took}{note}"


def clock(seconds: float) -> str:
    """Hours, minutes and seconds."""
    return str(timedelta(seconds=round(seconds)))


def summary(board: Board, lanes: int) -> str:
    """Numbers by status, and with `lanes` how long the rest may take, by the mean of the cells so far."""
    counts = board.counts()
    parts = [f"{counts['done']}/{len(board.cells)} done"]
    parts += [f"{counts[s]} {s}" for s in ("running", "waiting", "failed", "skipped", "interrupted") if counts[s]]
    times = [p.seconds() for p in board.of("done") if p.fresh]
    if lanes and times and (left := board.of("running") + board.of("waiting")):
        mean = sum(times) / len(times)
        work = sum(max(0.0, mean - progress.seconds()) for progress in left)
        parts.append(f"about {clock(work / max(1, min(lanes, len(left))))} left")
    return ", ".join(parts)


class Lines:
    """Plain lines, for logs and pipes.

    Args:
        console: Where to.
        lanes: Cells that can run at a time.
    """

    def __init__(self, console: Console, lanes: int) -> None:
        self.console, self.lanes = console, lanes

    def update(self, board: Board) -> None:
        """Print a line an event."""
        for event in board.events:
            ended = sum(progress.status in ENDED for progress in board.cells.values())
            self.say(f"[{ended}/{len(board.cells)}] {line(event)}")
            if event.status in ENDED and event.fresh:
                self.say(f"  {summary(board, self.lanes)}")

    def say(self, text: str) -> None:
        """Print a sentence."""
        self.console.print(Text(text), soft_wrap=True)

    def close(self) -> None:
        """Nothing to do."""


class Screen:
    """A table that is drawn anew as things happen.

    Args:
        console: A terminal.
        lanes: Cells that can run at a time.
        every: Seconds between drawings.
    """

    def __init__(self, console: Console, lanes: int, every: float = 0.5) -> None:
        self.console, self.lanes, self.every = console, lanes, every
        # Without a thread of its own: the sweep starts processes, and draws between two looks at them.
        self.live = Live(console=console, auto_refresh=False, transient=False)
        self.live.start()
        self.last = 0.0

    def update(self, board: Board) -> None:
        """Draw, if something happened or it is time."""
        now = time.monotonic()
        if board.events or now - self.last >= self.every:
            self.last = now
            self.live.update(picture(board, self.lanes, self.console.height), refresh=True)

    def say(self, text: str) -> None:
        """Print a sentence above the table."""
        self.live.console.print(Text(text), soft_wrap=True)

    def close(self) -> None:
        """Leave the last table where it is."""
        self.live.stop()


def picture(board: Board, lanes: int, height: int) -> Group:
    """The table of a board in at most `height` lines, with a line of numbers below."""
    table = Table(box=None, pad_edge=False, expand=True)
    for name, ratio in (("cell", None), ("status", None), ("where", None), ("time", None), ("last line", 1)):
        table.add_column(name, ratio=ratio, no_wrap=True, overflow="ellipsis", justify="left")
    rows = list(board.cells.values())
    room = max(4, height - 4)
    if len(rows) > room:
        chosen = sorted(range(len(rows)), key=lambda i: (ORDER.index(rows[i].status), i))[: room - 1]
        hidden = len(rows) - len(chosen)
        rows = [rows[i] for i in sorted(chosen)]
    else:
        hidden = 0
    for progress in rows:
        style = STYLES[progress.status]
        took = clock(progress.seconds()) if progress.started else ""
        words = (progress.cell.name, progress.status, progress.where, took, progress.note)
        table.add_row(*(Text(word, style=style if i == 1 else "") for i, word in enumerate(words)))
    if hidden:
        table.add_row(Text(f"... and {hidden} more", style="dim"))
    return Group(table, Text(summary(board, lanes), style="bold"))
