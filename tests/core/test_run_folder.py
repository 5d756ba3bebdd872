"""What a run leaves behind, and when it refuses or goes on."""

import json
import shutil
from pathlib import Path
from typing import Any

import cases
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import kvc
from kvc.__main__ import main


@pytest.fixture(scope="module")
def finished(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one epoch on ragged rows."""
    run = tmp_path_factory.mktemp("runs") / "run"
    config = cases.lora_config(tiny_folder)
    config["trainer"]["max_epochs"] = 1
    assert cases.fit(config, run) == 0
    return run


def again(run: Path, *options: str) -> int:
    return main(["fit", "--config", str(run.with_suffix(".yaml")), "--run_dir", str(run), *options])


def copy_of(run: Path, place: Path) -> Path:
    shutil.copytree(run, place / "run")
    shutil.copy(run.with_suffix(".yaml"), place / "run.yaml")
    return place / "run"


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def result_of(folder: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return result


def test_files_of_a_finished_run(finished: Path) -> None:
    names = set(contents(finished))
    assert {"config.yaml", "result.json", "checkpoints/last.ckpt", "checkpoints/best.ckpt"} <= names
    assert {f"eval/test/{name}" for name in ("config.yaml", "predictions.jsonl", "result.json")} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert not [name for name in names if name.endswith(".tmp")]


def test_result_says_what_where_and_from_what(finished: Path) -> None:
    result = result_of(finished)
    assert {
        *("schema", "command", "method", "seed", "identity", "samples", "metrics", "base_model", "data"),
        *("sizes", "timing", "config", "versions", "git", "machine"),
    } <= result.keys()
    assert result["method"] == "cases.RaggedModel"
    assert result["command"] == "fit"
    assert result["seed"] == 42
    assert result["samples"] == 7
    assert result["data"]["hash"] == "ragged-24-20"
    assert {"value", "low", "high", "n"} == result["metrics"]["loss"].keys()
    assert result["timing"]["steps"] == 6
    assert result["timing"]["fit_seconds"] > 0
    assert 0 < result["sizes"]["trainable_parameters"] < result["sizes"]["parameters"]
    assert result_of(finished / "eval" / "test")["metrics"] == result["metrics"]


def test_predictions_have_a_line_for_every_row(finished: Path) -> None:
    lines = (finished / "eval" / "test" / "predictions.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in lines] == list(range(7))


def test_tensorboard_has_scalars_and_hyperparameters_with_final_metrics(finished: Path) -> None:
    events = EventAccumulator(str(finished)).Reload()
    scalars = set(events.Tags()["scalars"])
    assert {"train/loss", "val/loss", "final/loss"} <= scalars
    assert [e.value for e in events.Scalars("final/loss")] == pytest.approx(
        [result_of(finished)["metrics"]["loss"]["value"]]
    )
    plugin = events.PluginTagToContent("hparams")
    assert "_hparams_/session_start_info" in plugin
    started = plugin["_hparams_/session_start_info"]
    assert b"model.init_args.optim.lr" in started
    assert b"run_dir" not in started
    assert b"final/loss" in plugin["_hparams_/experiment"]


def test_the_same_command_again_changes_nothing(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(finished)
    assert again(finished) == 0
    assert "is finished" in capsys.readouterr().out
    assert contents(finished) == before


def test_where_and_how_it_runs_is_not_its_identity(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(finished)
    assert again(finished, "--data.num_workers", "1", "--save_every", "2", "--trainer.devices", "2") == 0
    assert "is finished" in capsys.readouterr().out
    assert contents(finished) == before


def test_another_configuration_is_refused(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(finished)
    assert again(finished, "--model.optim.lr", "0.5") == 2
    message = capsys.readouterr().err
    assert "model.init_args.optim.lr" in message
    assert "Traceback" not in message
    assert contents(finished) == before


def test_overwrite_starts_afresh(finished: Path, tmp_path: Path) -> None:
    run = copy_of(finished, tmp_path)
    (run / "eval" / "test" / "old.txt").write_text("old")
    assert again(run, "--model.optim.lr", "0.5", "--overwrite", "true") == 0
    assert not (run / "eval" / "test" / "old.txt").exists()
    assert result_of(run)["config"]["model"]["init_args"]["optim"]["lr"] == 0.5
    assert result_of(run)["identity"] != result_of(finished)["identity"]
    assert [path.name for path in tmp_path.iterdir() if path.name not in {"run", "run.yaml"}] == []


def test_evaluations_get_folders_of_their_own(finished: Path, tmp_path: Path) -> None:
    run = copy_of(finished, tmp_path)
    before = contents(run)
    assert main(["test", "--run", str(run), "--eval_name", "test2"]) == 0
    assert main(["validate", "--run", str(run)]) == 0
    assert main(["predict", "--run", str(run)]) == 0
    after = contents(run)
    assert {name: after[name] for name in before} == before
    assert result_of(run / "eval" / "test2")["metrics"] == result_of(run)["metrics"]
    assert result_of(run / "eval" / "validate")["metrics"] != result_of(run)["metrics"]
    assert "metrics" not in result_of(run / "eval" / "predict")
    for evaluation in ("test2", "validate", "predict"):
        assert len((run / "eval" / evaluation / "predictions.jsonl").read_text().splitlines()) == 7
        assert "checkpoint" in (run / "eval" / evaluation / "config.yaml").read_text()


def test_another_checkpoint_is_another_evaluation(finished: Path, tmp_path: Path) -> None:
    run = copy_of(finished, tmp_path)
    assert main(["test", "--run", str(run), "--eval_name", "again"]) == 0
    best = run / "checkpoints" / "best.ckpt"
    saved = torch.load(best, weights_only=True)
    saved["state_dict"] = {name: value + 0.1 for name, value in saved["state_dict"].items()}
    torch.save(saved, best)
    assert main(["test", "--run", str(run), "--eval_name", "again"]) == 2


def test_a_trained_method_is_never_evaluated_without_its_checkpoint(finished: Path, tmp_path: Path) -> None:
    run = copy_of(finished, tmp_path)
    config = ["--config", str(run.with_suffix(".yaml"))]
    assert main(["test", *config, "--run_dir", str(tmp_path / "untrained")]) == 2
    shutil.rmtree(run / "checkpoints")
    assert main(["test", "--run", str(run), "--eval_name", "without"]) == 2


def test_load_gives_the_best_weights(finished: Path) -> None:
    model = kvc.load(str(finished))
    assert isinstance(model, cases.RaggedModel)
    assert not model.training
    best = cases.checkpoint(finished, "best")["state_dict"]
    assert cases.same_bits(dict(model.trained_state()), dict(best)) == []
    loss = [record["loss"] for record in model.records(cases.pad_rows([cases.RaggedText().dataset("test")[0, 3]]))]
    lines = (finished / "eval" / "test" / "predictions.jsonl").read_text().splitlines()
    assert loss == pytest.approx([json.loads(lines[3])["loss"]], abs=1e-5)
