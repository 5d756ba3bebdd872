"""The sweep on local slots, over stub cells: who runs when, and what a rerun does."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

GRID = {"set": {"steps": 3}, "axes": {"lr": [1, 2, 3], "size": ["s", "m"]}, "seeds": [1, 2]}
NAMES = [f"lr={lr},size={size},seed={seed}" for lr in (1, 2, 3) for size in "sm" for seed in (1, 2)]


def test_every_cell_runs_once_and_a_rerun_runs_none(stub_sweep, capsys):
    stub_sweep.grid(**GRID)
    assert stub_sweep.run("--slots", "cpu:2") == 0
    assert sorted(stub_sweep.started()) == sorted(NAMES)
    assert {line.split(" on ")[1] for line in stub_sweep.history() if " started on " in line} == {
        "slot cpu0",
        "slot cpu1",
    }
    capsys.readouterr()
    assert stub_sweep.run("--slots", "cpu:2") == 0
    assert len(stub_sweep.started()) == 12
    assert capsys.readouterr().out.count("was done before") == 12


def test_killed_cell_and_interrupted_sweep_are_finished_by_the_same_command(stub_sweep, on_update, capsys):
    """One cell is killed, then the sweep is interrupted; the rerun runs exactly what is missing."""
    stub_sweep.grid(**GRID)
    stub_sweep.keep(NAMES[3], NAMES[7])
    pids = {}

    def intervene(board):
        one, other = board.cells[NAMES[3]], board.cells[NAMES[7]]
        if one.status == "running" and one.note and NAMES[3] not in pids:
            pids[NAMES[3]] = int(one.note.removeprefix("stub at work: "))
            os.kill(pids[NAMES[3]], signal.SIGKILL)
        if one.status == "failed" and other.status == "running" and other.note and NAMES[7] not in pids:
            pids[NAMES[7]] = int(other.note.removeprefix("stub at work: "))
            os.kill(os.getpid(), signal.SIGINT)

    on_update(intervene)
    assert stub_sweep.run("--slots", "cpu:2") == 130
    first = stub_sweep.started()
    done = [name for name in NAMES if (stub_sweep.root / name / "result.json").is_file()]
    text = capsys.readouterr().out
    assert f"{NAMES[3]} failed: killed by signal 9" in text
    assert f"{NAMES[7]} interrupted" in text
    assert not Path(f"/proc/{pids[NAMES[7]]}").exists(), "an orphan is left"
    assert {NAMES[3], NAMES[7]} <= set(first) - set(done)
    assert len(done) < 11
    before = {name: (stub_sweep.root / name / "result.json").stat().st_mtime_ns for name in done}

    stub_sweep.release(NAMES[3], NAMES[7])
    assert stub_sweep.run("--slots", "cpu:2") == 0
    assert sorted(stub_sweep.started()[len(first) :]) == sorted(set(NAMES) - set(done))
    assert all((stub_sweep.root / name / "result.json").stat().st_mtime_ns == t for name, t in before.items())
    assert stub_sweep.result(NAMES[7])["begun"], "the interrupted cell goes on from its checkpoint"


def test_a_second_ctrl_c_kills(stub_sweep, on_update, monkeypatch, capsys):
    stub_sweep.grid(axes={"lr": [1, 2]})
    stub_sweep.keep("lr=1", "lr=2")
    asked = []
    # A cell that does not end when it is asked to.
    monkeypatch.setattr("kvc.sweep.process.CellProcess.terminate", lambda self: None)

    def interrupt(board):
        if len(board.of("running")) == 2 and all(p.note for p in board.of("running")) and len(asked) < 2:
            asked.append(1)
            os.kill(os.getpid(), signal.SIGTERM)

    on_update(interrupt)
    assert stub_sweep.run("--slots", "cpu:2") == 130
    assert "killing 2 running cells" in capsys.readouterr().out
    assert not list(stub_sweep.root.glob("*/result.json"))


def test_only_what_has_changed_is_made_again(stub_sweep, capsys):
    stub_sweep.grid(axes={"lr": [1, 2]})
    assert stub_sweep.run("--slots", "cpu:1") == 0
    stub_sweep.grid(axes={"lr": [1, 2, 3]}, set={"steps": 3}, exclude=[{"lr": 1}])
    assert stub_sweep.run("--slots", "cpu:1") == 0
    assert stub_sweep.started()[2:] == ["lr=2", "lr=3"]
    assert "lr=2 is stale and is made again (steps: None there, '3' here)" in stub_sweep.history()
    assert yaml.safe_load((stub_sweep.root / "lr=2" / "config.yaml").read_text())["steps"] == "3"
    assert stub_sweep.result("lr=1"), "what the grid no longer names is left alone"


def test_failures_are_collected_and_those_that_need_them_are_skipped(stub_sweep, capsys):
    stub_sweep.grid(
        stages={
            "train": {"axes": {"lr": [1, {"name": "bad", "set": {"lr": 2, "fail": "yes"}}]}},
            "check": {"each": "train", "set": {"of": "{train.run_dir}"}},
            "all": {"needs": ["check"]},
        }
    )
    assert stub_sweep.run("--slots", "cpu:2") == 1
    out = capsys.readouterr().out
    log = stub_sweep.root / ".sweep" / "logs" / "train" / "lr=bad.log"
    assert f"train/lr=bad failed: exit code 1; the end of {log}:" in out
    assert "  stub: it went wrong" in out
    assert "check/lr=bad was skipped: needs train/lr=bad" in out
    assert "all was skipped: needs check/lr=bad" in out
    assert sorted(stub_sweep.started()) == ["check/lr=1", "train/lr=1", "train/lr=bad"]
    assert "2/5 done, 1 failed, 2 skipped" in out


def test_a_cell_waits_for_those_that_it_needs(stub_sweep):
    stub_sweep.grid(
        stages={
            "after": {"needs": "train", "set": {"of": "{shared.run_dir}"}},
            "train": {"axes": {"lr": [1, 2]}, "needs": "shared"},
            "shared": {},
        }
    )
    assert stub_sweep.run("--slots", "cpu:3") == 0
    assert stub_sweep.started() == ["shared", "train/lr=1", "train/lr=2", "after"]
    history = stub_sweep.history()
    ends = {line.split(" done ")[0]: i for i, line in enumerate(history) if " done after " in line}
    starts = {line.split(" started ")[0]: i for i, line in enumerate(history) if " started on " in line}
    assert ends["shared"] < starts["train/lr=1"]
    assert max(ends["train/lr=1"], ends["train/lr=2"]) < starts["after"]
    assert yaml.safe_load((stub_sweep.root / "after" / "config.yaml").read_text())["of"] == str(
        stub_sweep.root / "shared"
    )


def test_exit_code_zero_without_a_result_is_a_failure(stub_sweep, monkeypatch, capsys):
    monkeypatch.setattr("kvc.sweep.process.PROGRAM", (sys.executable, "-c", "print('nothing to see')"))
    stub_sweep.grid(axes={"lr": [1]})
    assert stub_sweep.run() == 1
    assert "lr=1 failed: exit code 0, but no result" in capsys.readouterr().out


def test_only_runs_what_matches_and_what_it_needs(stub_sweep, capsys):
    stages = {"train": {"axes": {"lr": [1, 2, 3]}}, "check": {"each": "train"}}
    stub_sweep.grid(stages=stages)
    assert stub_sweep.run("--only", "check/*=2", "--slots", "cpu:2") == 0
    assert stub_sweep.started() == ["train/lr=2", "check/lr=2"]
    assert stub_sweep.run("--only", "x*") == 2
    assert "--only x*: no cell has such a name" in capsys.readouterr().err


def test_dry_run_starts_nothing(stub_sweep, capsys):
    stub_sweep.grid(**GRID)
    assert stub_sweep.run("--dry-run") == 0
    out = capsys.readouterr().out
    assert (
        f"{NAMES[0]}  [missing]\n    python -m kvc fit --steps 3 --lr 1 --size s --seed_everything 1 --run_dir" in out
    )
    assert "12 cells; nothing was started" in out
    assert not stub_sweep.root.exists()


def test_dry_run_says_what_is_done_stale_and_waiting(stub_sweep, capsys):
    stages = {"train": {"axes": {"lr": [1, 2]}}, "check": {"each": "train"}}
    stub_sweep.grid(stages=stages)
    assert stub_sweep.run("--only", "*lr=1") == 0
    stub_sweep.grid(stages={**stages, "check": {"each": "train", "set": {"steps": 3}}})
    capsys.readouterr()
    assert stub_sweep.run("--dry-run") == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "[" in line]
    assert lines == [
        "train/lr=1  [done]",
        "train/lr=2  [missing]",
        "check/lr=1  [stale: steps: None there, '3' here]",
        "check/lr=2  [waits for train/lr=2]",
    ]


def test_two_sweeps_of_one_folder_are_refused(stub_sweep, capsys):
    stub_sweep.grid(axes={"lr": [1]})
    code = (
        "import sys, time; from pathlib import Path; from kvc.runs import lock_folder\n"
        f"lock = lock_folder(Path({str(stub_sweep.root)!r})); print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        assert stub_sweep.run() == 2
        other.kill()
    assert "in use by another process" in capsys.readouterr().err
    assert stub_sweep.run() == 0


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks the Linux kernel")
def test_cells_end_with_a_sweep_that_is_killed(stub_sweep):
    """The kernel tells them: a sweep that is SIGKILLed cannot."""
    from kvc.sweep.process import PROGRAM

    stub_sweep.keep("run")
    script = (
        "import os, sys, time; from pathlib import Path; from kvc.sweep.process import CellProcess\n"
        f"p = CellProcess(['fit', '--run_dir', {str(stub_sweep.root / 'run')!r}], os.environ, "
        f"Path({str(stub_sweep.root / 'log')!r}), {PROGRAM!r})\n"
        "while not p.tail(): time.sleep(0.02)\n"
        "print(p.popen.pid, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as sweep:
        pid = int(sweep.stdout.readline())
        sweep.kill()
    last = stub_sweep.root / "run" / "checkpoints" / "last.ckpt"
    for _ in range(500):
        if not Path(f"/proc/{pid}").exists():
            break
        time.sleep(0.02)
    assert last.read_text() == "half"
    assert not Path(f"/proc/{pid}").exists()
