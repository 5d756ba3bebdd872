"""A run that was killed and started again gives the bits of one that never stopped."""

import signal
from pathlib import Path
from typing import Any

import cases
import pytest

from kvc.methods.comp import CompClassifier

EVERY = ("--save_every", "3")
COMPUTED = ("state_dict", "optimizer_states", "lr_schedulers", "kvc", "global_step", "epoch")


@pytest.fixture(autouse=True)
def quick(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVC_CACHE", str(tmp_path_factory.getbasetemp() / "hidden-states"))
    monkeypatch.setattr(CompClassifier, "figures", lambda *_: {})  # drawing is slow, and not the matter here


def changed(one: Path, other: Path) -> list[str]:
    """Where the last and best checkpoints of two runs differ in anything that was computed."""
    return [
        path
        for name in ("last", "best")
        for key in COMPUTED
        for path in cases.same_bits(
            cases.checkpoint(one, name)[key], cases.checkpoint(other, name)[key], f"{name}/{key}"
        )
    ]


def killed_and_resumed(config: Any, run: Path, step: int, *options: str) -> None:
    cases.fit_killed(config, run, step, *options)
    assert cases.checkpoint(run)["global_step"] == step - step % 3
    assert not (run / "result.json").exists()
    assert cases.fit(config, run, *options) == 0
    assert (run / "result.json").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("name", cases.CASES)
def test_killed_and_resumed_equals_uninterrupted(name: str, tiny_folder: Path, tmp_path: Path) -> None:
    config = cases.CASES[name](tiny_folder)
    assert cases.fit(config, tmp_path / "whole", *EVERY) == 0
    # Six steps an epoch: in the first epoch, after the save that its last batch asked for, in the second.
    for step in (5, 7, 11):
        run = tmp_path / f"killed{step}"
        killed_and_resumed(config, run, step, *EVERY)
        assert changed(tmp_path / "whole", run) == []


def test_checkpoints_do_not_change_the_bits(tiny_folder: Path, tmp_path: Path) -> None:
    config = cases.lora_config(tiny_folder)
    assert cases.fit(config, tmp_path / "one", *EVERY) == 0
    assert cases.fit(config, tmp_path / "two", "--save_every", "1") == 0
    assert changed(tmp_path / "one", tmp_path / "two") == []


@pytest.mark.slow
def test_another_seed_changes_the_bits(tiny_folder: Path, tmp_path: Path) -> None:
    config = cases.comp_config(tiny_folder)
    assert cases.fit(config, tmp_path / "one") == 0
    assert cases.fit(config, tmp_path / "two") == 0
    assert cases.fit(config | {"seed_everything": 43}, tmp_path / "three") == 0
    assert changed(tmp_path / "one", tmp_path / "two") == []
    assert changed(tmp_path / "one", tmp_path / "three") != []


@pytest.mark.slow
def test_resume_with_loader_processes(tiny_folder: Path, tmp_path: Path) -> None:
    config = cases.comp_config(tiny_folder)
    assert cases.fit(config, tmp_path / "whole", *EVERY) == 0
    config["data"]["init_args"]["num_workers"] = 2
    killed_and_resumed(config, tmp_path / "killed", 11, *EVERY)
    assert changed(tmp_path / "whole", tmp_path / "killed") == []


@pytest.mark.parametrize("name", cases.CASES)
def test_resume_with_accumulation(name: str, tiny_folder: Path, tmp_path: Path) -> None:
    config = cases.CASES[name](tiny_folder)
    config["trainer"] |= {"accumulate_grad_batches": 2, "max_epochs": 3}
    # Three optimiser steps an epoch; step 4 ends the second batch of the second epoch.
    assert cases.fit(config, tmp_path / "whole", "--save_every", "2") == 0
    cases.fit_killed(config, tmp_path / "killed", 5, "--save_every", "2")
    assert cases.checkpoint(tmp_path / "killed")["global_step"] == 4
    assert cases.fit(config, tmp_path / "killed", "--save_every", "2") == 0
    assert changed(tmp_path / "whole", tmp_path / "killed") == []


@pytest.mark.slow
def test_resume_where_validations_fall_within_an_epoch(tiny_folder: Path, tmp_path: Path) -> None:
    config = cases.lora_config(tiny_folder)
    config["trainer"]["val_check_interval"] = 2
    assert cases.fit(config, tmp_path / "whole", "--save_every", "2") == 0
    for step in (3, 5, 9):
        cases.fit_killed(config, tmp_path / f"killed{step}", step, "--save_every", "2")
        assert cases.checkpoint(tmp_path / f"killed{step}")["global_step"] == step - 1
        assert cases.fit(config, tmp_path / f"killed{step}", "--save_every", "2") == 0
        assert changed(tmp_path / "whole", tmp_path / f"killed{step}") == []


def test_killed_in_the_final_evaluation(tiny_folder: Path, tmp_path: Path) -> None:
    config = cases.lora_config(tiny_folder)
    assert cases.fit(config, tmp_path / "whole") == 0
    cases.fit_killed(config, tmp_path / "killed", 0)
    assert not (tmp_path / "killed" / "result.json").exists()
    assert cases.fit(config, tmp_path / "killed") == 0
    assert (tmp_path / "killed" / "result.json").is_file()
    assert changed(tmp_path / "whole", tmp_path / "killed") == []


@pytest.mark.slow
@pytest.mark.parametrize("batches", [5, 12, 20])
def test_sigterm_saves_wherever_it_comes(
    batches: int, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = cases.comp_config(tiny_folder)
    config["trainer"] |= {"accumulate_grad_batches": 2, "max_epochs": 4}
    assert cases.fit(config, tmp_path / "whole") == 0
    with monkeypatch.context() as environment:
        environment.setenv(cases.KILL_BATCH, str(batches))
        environment.setenv(cases.SIGNAL, str(int(signal.SIGTERM)))
        assert cases.fit(config, tmp_path / "stopped") == 143
    # The twelfth batch ends an epoch: a validation that was cut short leaves the checkpoint of the epoch before.
    assert cases.checkpoint(tmp_path / "stopped")["global_step"] == {5: 2, 12: 3, 20: 10}[batches]
    assert cases.fit(config, tmp_path / "stopped") == 0
    assert changed(tmp_path / "whole", tmp_path / "stopped") == []


def test_an_early_end_is_the_end(tiny_folder: Path, tmp_path: Path) -> None:
    """Validations that do not improve end training; killed before its evaluation, a run does not train on."""
    config = cases.lora_config(tiny_folder)
    config["trainer"]["callbacks"].append(
        {"class_path": "kvc.callbacks.early_stopping.StopEarly", "init_args": {"patience": 1, "min_delta": 100.0}}
    )
    config["trainer"]["max_epochs"] = 4
    assert cases.fit(config, tmp_path / "whole") == 0
    assert cases.checkpoint(tmp_path / "whole")["global_step"] == 12
    cases.fit_killed(config, tmp_path / "killed", 0)
    assert cases.fit(config, tmp_path / "killed") == 0
    assert (tmp_path / "killed" / "result.json").is_file()
    assert changed(tmp_path / "whole", tmp_path / "killed") == []


def test_steps_may_end_before_the_first_validation(tiny_folder: Path, tmp_path: Path) -> None:
    config = cases.lora_config(tiny_folder)
    config["trainer"]["callbacks"].append({"class_path": "kvc.callbacks.early_stopping.StopEarly"})
    assert cases.fit(config, tmp_path / "run", "--trainer.max_steps", "4") == 0
    assert cases.checkpoint(tmp_path / "run")["global_step"] == 4
    assert (tmp_path / "run" / "result.json").is_file()
