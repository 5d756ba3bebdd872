"""GPU and CPU slots: who gets which, and what a process sees of them."""

import os

import pytest

from kvc.sweep.slots import Pool, Slot, environment, parse_slots, visible_gpus


def test_each_process_sees_its_own_gpus(stub_sweep, on_update):
    """Six cells on four GPUs of a list that only exists on paper, one of the stages with two for each cell."""
    stub_sweep.grid(
        stages={
            "one": {"axes": {"lr": [1, 2, 3, 4]}},
            "two": {"axes": {"size": [1, 2]}, "gpus_per_cell": 2, "needs": "one"},
        }
    )
    names = [f"lr={lr}" for lr in (1, 2, 3, 4)]
    stub_sweep.keep(*names, "size=1", "size=2")

    def release_when_full(board):
        running = {progress.cell.name.split("/")[1] for progress in board.of("running") if progress.note}
        if running in ({*names}, {"size=1", "size=2"}):
            stub_sweep.release(*running)

    on_update(release_when_full)
    assert stub_sweep.run("--slots", "4,5,6,7") == 0
    seen = {name: stub_sweep.result(f"one/{name}")["seen"] for name in names}
    assert {name: env["CUDA_VISIBLE_DEVICES"] for name, env in seen.items()} == dict(zip(names, "4567"))
    assert {env["SLURM_JOB_ID"] for env in seen.values()} == {None}, "a cell is no task of the surrounding SLURM job"
    pairs = [stub_sweep.result(f"two/size={size}")["seen"]["CUDA_VISIBLE_DEVICES"] for size in (1, 2)]
    assert pairs == ["4,5", "6,7"]


def test_cells_of_two_gpus_wait_until_two_are_free():
    pool = Pool(parse_slots("0,1,2", []))
    one = pool.take(1)
    assert [slot.name for slot in one] == ["0"]
    two = pool.take(2)
    assert [slot.name for slot in two] == ["1", "2"]
    assert pool.take(1) == []
    pool.give(one)
    assert pool.take(2) == []
    pool.give(two)
    assert [slot.name for slot in pool.free] == ["0", "1", "2"]


def test_a_gpu_that_stands_twice_takes_two_cells_but_no_cell_twice():
    pool = Pool(parse_slots("0,0,1", []))
    assert not pool.fits(3)
    assert [slot.name for slot in pool.take(2)] == ["0", "1"]
    assert [slot.name for slot in pool.take(1)] == ["0"]


@pytest.mark.parametrize(
    ("text", "gpus", "names"),
    [
        (None, ["2", "3"], ["2", "3"]),
        (None, [], ["cpu0"]),
        ("cpu:2", ["0"], ["cpu0", "cpu1"]),
        ("1, 3", ["0"], ["1", "3"]),
        ("GPU-8f2a-11,MIG-7/1/0", [], ["GPU-8f2a-11", "MIG-7/1/0"]),
    ],
)
def test_slots_of_the_command_line(text, gpus, names):
    assert [slot.name for slot in parse_slots(text, gpus)] == names


def test_default_slots_are_the_gpus_that_this_process_may_use(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    assert visible_gpus() == ["4", "6"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert visible_gpus() == []


def test_threads_are_divided_and_gpus_hidden_on_the_cpu(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))
    slots = parse_slots("cpu:4", [])
    inherited = {"PATH": "/bin", "SLURM_NTASKS": "2", "PL_GLOBAL_SEED": "1", "CUDA_VISIBLE_DEVICES": "0,1"}
    env = environment(slots[:1], 4, inherited)
    assert env["OMP_NUM_THREADS"] == env["MKL_NUM_THREADS"] == "4"
    assert env["CUDA_VISIBLE_DEVICES"] == ""
    assert env["PATH"] == "/bin"
    assert not {"SLURM_NTASKS", "PL_GLOBAL_SEED"} & env.keys()
    assert environment(slots[:2], 4, {})["OMP_NUM_THREADS"] == "8"
    assert environment(slots[:1], 4, {"OMP_NUM_THREADS": "2"})["OMP_NUM_THREADS"] == "2"
    assert environment([Slot("3", "3")], 32, {})["OMP_NUM_THREADS"] == "1"
