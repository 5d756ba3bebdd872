"""Two ranks equal one process with twice the batch, count every row once and resume exactly."""

import json
from pathlib import Path
from typing import Any

import cases
import pytest
import torch

from kvc.core.datamodule import DealtSampler
from kvc.methods.comp import CompClassifier

TWO_RANKS = {"strategy": "ddp_fork", "devices": 2}


@pytest.fixture(autouse=True)
def quick(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVC_CACHE", str(tmp_path_factory.getbasetemp() / "hidden-states"))
    monkeypatch.setattr(CompClassifier, "figures", lambda *_: {})  # drawing is slow, and not the matter here


def config_of(name: str, tiny_folder: Path, batch: int, shuffle: bool = False, **trainer: Any) -> Any:
    config = cases.CASES[name](tiny_folder, dropout=0.0)
    config["trainer"] |= trainer
    # Adam divides by the size of a gradient, so it blows rounding up to the learning rate.
    config["model"]["init_args"]["optim"]["lr"] = 0.0005
    config["data"]["init_args"]["batch_size"] = batch
    if name == "lora":
        config["data"]["init_args"]["shuffle"] = shuffle
    return config


def trained(config: Any, run: Path) -> dict[str, torch.Tensor]:
    assert cases.fit(config, run) == 0
    saved = cases.checkpoint(run)
    return {key: value for key, value in saved["state_dict"].items() if key not in {"threshold", "rate"}}


def records(run: Path) -> list[Any]:
    return [json.loads(line) for line in (run / "eval" / "test" / "predictions.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("name", cases.CASES)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_weights_equal_one_process_with_twice_the_batch(
    name: str, accumulate: int, tiny_folder: Path, tmp_path: Path
) -> None:
    clip = {"gradient_clip_val": 0.05, "accumulate_grad_batches": accumulate}
    one = trained(config_of(name, tiny_folder, 4, **clip), tmp_path / "one")
    two = trained(config_of(name, tiny_folder, 2, **clip, **TWO_RANKS), tmp_path / "two")
    difference = cases.distance(one, two)
    print(f"{name}, accumulate {accumulate}: largest difference {difference:.2e}")
    assert difference <= 1e-6
    assert cases.checkpoint(tmp_path / "one")["global_step"] == cases.checkpoint(tmp_path / "two")["global_step"]


@pytest.mark.parametrize("name", cases.CASES)
def test_accumulated_batches_equal_one_large_batch(name: str, tiny_folder: Path, tmp_path: Path) -> None:
    one = trained(config_of(name, tiny_folder, 8), tmp_path / "one")
    two = trained(config_of(name, tiny_folder, 4, accumulate_grad_batches=2), tmp_path / "two")
    assert cases.distance(one, two) <= 1e-6


@pytest.mark.parametrize("name", cases.CASES)
def test_clipping_and_batch_size_matter_at_all(name: str, tiny_folder: Path, tmp_path: Path) -> None:
    one = trained(config_of(name, tiny_folder, 4, max_epochs=1, gradient_clip_val=0.05), tmp_path / "one")
    two = trained(config_of(name, tiny_folder, 2, max_epochs=1, gradient_clip_val=0.05), tmp_path / "two")
    assert cases.distance(one, two) > 1e-4


@pytest.mark.parametrize("name", cases.CASES)
def test_evaluation_on_two_ranks_counts_seven_rows_once(name: str, tiny_folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert cases.fit(config_of(name, tiny_folder, 4, max_epochs=1), run) == 0
    options = ["--trainer.strategy", "ddp_fork", "--trainer.devices", "2"]
    assert cases.main(["test", "--run", str(run), "--eval_name", "ranks", *options]) == 0
    alone, ranks = run / "eval" / "test", run / "eval" / "ranks"
    assert len(records(run)) == 7
    lines = [json.loads(line) for line in (ranks / "predictions.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == [line["id"] for line in records(run)]
    for one, two in zip(records(run), lines):
        assert near(one, two), (one, two)
    results = [json.loads((folder / "result.json").read_text()) for folder in (alone, ranks)]
    assert results[0]["samples"] == results[1]["samples"] == 7
    assert results[0]["metrics"].keys() == results[1]["metrics"].keys()
    for key, value in results[0]["metrics"].items():
        if "seconds" in key:
            continue
        assert results[1]["metrics"][key] == pytest.approx(value, rel=1e-5, abs=1e-5), key


def near(one: Any, two: Any) -> bool:
    """The same but for rounding (a batch of other rows sums in another order) and for the time that it took."""
    if isinstance(one, dict):
        return one.keys() == two.keys() and all("seconds" in key or near(one[key], two[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(two) and all(map(near, one, two))
    return one == (pytest.approx(two, rel=1e-5, abs=1e-5) if isinstance(one, float) else two)


def test_validation_on_two_ranks_gives_the_same_loss(tiny_folder: Path, tmp_path: Path) -> None:
    scores = []
    for name, settings in (("one", {"batch": 4}), ("two", {"batch": 2, **TWO_RANKS})):
        assert cases.fit(config_of("lora", tiny_folder, max_epochs=1, **settings), tmp_path / name) == 0
        callbacks = cases.checkpoint(tmp_path / name, "best")["callbacks"]
        scores.append(next(float(v["best_model_score"]) for k, v in callbacks.items() if "ModelCheckpoint" in k))
    assert scores[0] == pytest.approx(scores[1], abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", cases.CASES)
def test_resume_on_two_ranks(name: str, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = cases.CASES[name](tiny_folder)
    config["trainer"] |= TWO_RANKS
    config["data"]["init_args"]["batch_size"] = 2
    options = ("--save_every", "3")
    assert cases.fit(config, tmp_path / "whole", *options) == 0
    monkeypatch.setenv(cases.KILL_AT, "11")
    with pytest.raises(Exception, match=r"SIGKILL|terminated"):
        cases.fit(config, tmp_path / "killed", *options)
    monkeypatch.delenv(cases.KILL_AT)
    assert cases.checkpoint(tmp_path / "killed")["global_step"] == 9
    assert cases.fit(config, tmp_path / "killed", *options) == 0
    for file in ("last", "best"):
        one, two = (cases.checkpoint(tmp_path / run, file) for run in ("whole", "killed"))
        for key in ("state_dict", "optimizer_states", "kvc"):
            assert cases.same_bits(one[key], two[key], key) == []


def test_ranks_draw_different_dropout(tiny_folder: Path, tmp_path: Path) -> None:
    config = cases.lora_config(tiny_folder)
    config["trainer"] |= TWO_RANKS | {"max_epochs": 1}
    assert cases.fit(config, tmp_path / "run") == 0
    first, second = cases.checkpoint(tmp_path / "run")["kvc"]["ranks"]
    assert not torch.equal(first["rng"]["torch"], second["rng"]["torch"])


@pytest.mark.parametrize("multiple", [3, 1])
def test_rows_are_dealt_out_in_the_order_of_one_process(multiple: int) -> None:
    ranks = [list(DealtSampler([11], 5, True, multiple, 3, rank)) for rank in range(3)]
    alone = [*DealtSampler([11], 5, True)]
    dealt = [row for step in zip(*ranks) for row in step]
    assert dealt == alone[: len(dealt)]
    assert sorted(row for rank in ranks for row in rank) == sorted(alone[:9] if multiple == 3 else alone)
    assert [len(DealtSampler([11], 5, True, multiple, 3, rank)) for rank in range(3)] == [len(rank) for rank in ranks]


@pytest.mark.parametrize(("rows", "batches"), [(27, 6), (24, 6), (7, 2)])
def test_accumulated_steps_are_whole(rows: int, batches: int, tiny_folder: Path, tmp_path: Path) -> None:
    """Steps of 2 x 4 rows: the three that are left over would weigh as much as eight; fewer than eight are all used."""
    config = config_of("lora", tiny_folder, 4, max_epochs=1, accumulate_grad_batches=2)
    config["data"]["init_args"]["rows"] = rows
    assert cases.fit(config, tmp_path / "run") == 0
    saved = cases.checkpoint(tmp_path / "run")
    assert saved["global_step"] == batches // 2
    assert saved["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["completed"] == batches


def test_order_changes_with_the_epoch_and_the_seed() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        sampler = DealtSampler([50], seed, True)
        sampler.set_epoch(epoch)
        return [index for _, index in sampler]

    assert order(1, 2) == order(1, 2)
    assert order(1, 2) != order(1, 3)
    assert order(1, 2) != order(2, 2)
