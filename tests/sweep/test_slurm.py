"""The SLURM executor: with submitit's local executor, and with an `sbatch` that only writes down what it gets."""

import os
import signal
from pathlib import Path

import pytest
import yaml
from sweep_small import SMALL

from kvc.__main__ import main
from kvc.sweep.cells import Cell
from kvc.sweep.plan import Plan
from kvc.sweep.slurm import CellJob, SlurmExecutor, cell_environment, parse_parameters

LOCAL = ("--executor", "slurm", "--slurm", "cluster=local", "timeout_min=10")


def task_of(where: str) -> int:
    """Process that runs submitit's job, below the controller that gives the job its number."""
    controller = where.split()[-1]
    return int(Path(f"/proc/{controller}/task/{controller}/children").read_text().split()[0])


def test_job_out_of_time_saves_is_queued_again_and_goes_on(stub_sweep, on_update):
    """As SLURM does it: SIGUSR2 to every process of the job when its time is nearly up."""
    stub_sweep.grid(stages={"train": {"axes": {"lr": [1, 2]}}, "check": {"each": "train"}})
    stub_sweep.keep("lr=1")
    warned = []

    def warn(board):
        progress = board.cells["train/lr=1"]
        if "stub at work: " not in progress.note:
            return
        pid = int(progress.note.split()[-1])
        if not warned:
            warned.append(pid)
            os.kill(pid, signal.SIGUSR2)
            os.kill(task_of(progress.where), signal.SIGUSR2)
        elif pid != warned[0]:
            stub_sweep.release("lr=1")

    on_update(warn)
    assert stub_sweep.run(*LOCAL) == 0
    assert warned
    log = (stub_sweep.root / ".sweep" / "logs" / "train" / "lr=1.log").read_text()
    assert log.count("$ ") == 2, "started twice"
    assert f"stub at work: {warned[0]}" in log
    logs = "".join(path.read_text() for path in (stub_sweep.root / ".sweep" / "slurm").rglob("*.err"))
    logs += "".join(path.read_text() for path in (stub_sweep.root / ".sweep" / "slurm").rglob("*.out"))
    assert "this job is timed-out" in logs
    assert "Requeued job" in logs
    assert stub_sweep.result("train/lr=1")["begun"], "the second start found the checkpoint of the first"
    assert stub_sweep.result("check/lr=1")["seen"]["SLURM_JOB_ID"] is None
    assert stub_sweep.started() == ["train/lr=1", "train/lr=2", "check/lr=1", "check/lr=2"]
    assert stub_sweep.run(*LOCAL) == 0
    assert len(stub_sweep.started()) == 4, "all were done"


def test_cells_under_slurm_fail_with_the_end_of_their_log(stub_sweep, capsys):
    stub_sweep.grid(stages={"train": {"set": {"fail": "yes"}}, "check": {"each": "train"}})
    assert stub_sweep.run(*LOCAL) == 1
    out = capsys.readouterr().out
    assert "train failed: exit code 1" in out
    assert "  stub: it went wrong" in out
    assert "check was skipped: needs train" in out


def test_one_array_with_gpus_time_signal_and_requeue(tmp_path, monkeypatch):
    """What `sbatch` is given for a level of three cells."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, text in {
        "srun": "",
        "sbatch": f'cp "$1" {tmp_path}/submitted.sh; echo Submitted batch job 4321',
    }.items():
        (tools / name).write_text(f"#!/bin/sh\n{text}\n")
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
    cells = [
        Cell(f"lr={i}", "", ("fit",), tmp_path / str(i), slots=2, plan=Plan(tmp_path / str(i), {})) for i in (1, 2, 3)
    ]
    words = ["timeout_min=90", "partition=gpu", "cpus_per_task=8", "mem_gb=64", "array_parallelism=2"]
    executor = SlurmExecutor(tmp_path / "slurm", parse_parameters(words))
    executor.check(cells)
    assert executor.lanes == 2
    jobs = executor._executor(2, tmp_path / "slurm" / "%j").map_array(
        CellJob(tmp_path, cells, tmp_path), ["lr=1", "lr=2", "lr=3"]
    )
    assert [job.job_id for job in jobs] == ["4321_0", "4321_1", "4321_2"]
    text = (tmp_path / "submitted.sh").read_text()
    for line in (
        "--array=0-2%2",
        "--gpus-per-node=2",
        "--time=90",
        "--partition=gpu",
        "--cpus-per-task=8",
        "--mem=64GB",
        "--requeue",
        "--signal=USR2@90",
    ):
        assert f"#SBATCH {line}\n" in text, text


def test_parameters_and_environment():
    assert parse_parameters(["a=1", "b=2.5", "c=x=y"]) == {"a": 1, "b": 2.5, "c": "x=y"}
    env = cell_environment({"SLURM_PROCID": "0", "PL_GLOBAL_SEED": "3", "HOME": "/h", "CUDA_VISIBLE_DEVICES": "2"})
    assert env == {"HOME": "/h", "CUDA_VISIBLE_DEVICES": "2", "PYTHONUNBUFFERED": "1"}


@pytest.mark.slow
def test_a_fit_that_runs_out_of_time_is_resumed_to_the_end(tmp_path, monkeypatch, on_update):
    """A real fit under submitit: warned in the middle, saved, queued again, and finished from where it was."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("KVC_CACHE", str(tmp_path / "cache"))
    config = {**SMALL, "trainer": {**SMALL["trainer"], "logger": None, "max_epochs": 30, "log_every_n_steps": 1}}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "grid.yaml").write_text("{base: small.yaml, set: {save_every: 1}}")
    root = tmp_path / "root"
    run = root / "grid"
    warned = []

    def warn(board):
        progress = board.cells["grid"]
        if not warned and progress.status == "running" and (run / "checkpoints" / "last.ckpt").is_file():
            warned.append(progress.where)
            os.kill(task_of(progress.where), signal.SIGUSR2)

    on_update(warn)
    assert main(["sweep", str(tmp_path / "grid.yaml"), "--root", str(root), *LOCAL]) == 0
    assert warned
    assert (root / ".sweep" / "logs" / "grid.log").read_text().count("$ ") == 2, "started twice"
    steps = []
    for path in sorted(run.glob("events.*.0")):
        events = EventAccumulator(str(path)).Reload()
        steps.append([event.step for event in events.Scalars("train/loss")])
    assert len(steps) == 2, "each start wrote its own file"
    first, second = steps
    assert first[0] == 0
    assert 0 < second[0] <= first[-1] + 1
    assert second[-1] == 59
