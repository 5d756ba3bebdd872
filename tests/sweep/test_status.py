"""The live table and the lines."""

import io
import time
from pathlib import Path

from rich.console import Console

from kvc.sweep.board import Board
from kvc.sweep.cells import Cell
from kvc.sweep.process import tail
from kvc.sweep.state import Disk
from kvc.sweep.status import Screen, picture, summary


def board_of(folder: Path, count: int) -> Board:
    cells = [Cell(f"train/lr={i}", "train", ("fit",), folder / str(i)) for i in range(count)]
    board = Board(cells, Disk(folder, cells))
    progress = list(board.cells.values())
    for i, status in enumerate(("done", "failed", "running")):
        progress[i].status, progress[i].fresh, progress[i].started = status, True, time.monotonic() - 60
    progress[0].ended = progress[0].started + 40
    progress[2].started, progress[2].note, progress[2].where = time.monotonic() - 10, "step 3/9  loss 1.5", "slot 0"
    return board


def drawn(board: Board, height: int, width: int = 100) -> list[str]:
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    console.print(picture(board, 2, height))
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


def test_table_has_every_cell_with_status_slot_time_and_last_line(tmp_path):
    lines = drawn(board_of(tmp_path, 5), 40)
    assert lines[0].split() == ["cell", "status", "where", "time", "last", "line"]
    assert lines[1].split() == ["train/lr=0", "done", "0:00:40"]
    assert lines[2].split()[:2] == ["train/lr=1", "failed"]
    assert lines[3].split() == ["train/lr=2", "running", "slot", "0", "0:00:10", "step", "3/9", "loss", "1.5"]
    assert lines[4].split() == ["train/lr=3", "waiting"]
    # 30 s are left of the running cell and 40 s of each waiting one, on two slots.
    assert lines[6] == "1/5 done, 1 running, 2 waiting, 1 failed, about 0:00:55 left"


def test_table_fits_the_terminal_and_keeps_what_matters(tmp_path):
    lines = drawn(board_of(tmp_path, 50), 12, width=60)
    assert len(lines) <= 12
    assert all(len(line) <= 60 for line in lines)
    text = "\n".join(lines)
    assert "failed" in text
    assert "running" in text
    assert "... and 43 more" in text


def test_estimate_needs_a_finished_cell(tmp_path):
    board = board_of(tmp_path, 3)
    assert summary(board, lanes=0) == "1/3 done, 1 running, 1 failed"
    board.cells["train/lr=0"].status = "waiting"
    assert summary(board, 2) == "0/3 done, 1 running, 1 waiting, 1 failed"


def test_live_table_redraws_in_place_and_ends_in_order(tmp_path):
    output = io.StringIO()
    console = Console(file=output, width=80, height=20, force_terminal=True)
    board = board_of(tmp_path, 3)
    screen = Screen(console, 2, every=0.0)
    screen.update(board)
    board.cells["train/lr=2"].note = "step 4/9"
    screen.update(board)
    screen.say("a sentence")
    screen.close()
    text = output.getvalue()
    assert "step 3/9" in text
    assert "step 4/9" in text
    assert text.index("step 3/9") < text.index("\x1b[1A") < text.index("step 4/9"), "the cursor went up in between"
    assert "a sentence" in text
    assert text.endswith("\x1b[?25h"), "the cursor is shown again"


def test_tail_is_the_last_state_of_the_last_lines(tmp_path):
    log = tmp_path / "log"
    assert tail(log) == []
    log.write_bytes(b"old\n" + b"x" * 9000 + b"\none\n\n 10%\r 50%\r100%\nbad \xff byte\n")
    assert tail(log, count=3) == ["one", "100%", "bad \N{REPLACEMENT CHARACTER} byte"]
    assert tail(log, begin=9005) == ["one", "100%", "bad \N{REPLACEMENT CHARACTER} byte"]
