"""The AutoCompressor by the command line: train, evaluate both ways, load, and go on where it stopped."""

import json
from pathlib import Path
from typing import Any

import cases
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import kvc


def result(folder: Path) -> Any:
    return json.loads((folder / "result.json").read_text())


def lengths_are_logged(run: Path) -> None:
    """Three segments of each of six rows are summarised, in at most two steps."""
    events = EventAccumulator(str(run)).Reload()
    expected, real = (events.Scalars(f"val/{name}vectors")[-1].value for name in ("expected_", ""))
    lengths, stop = (events.Histograms(f"val/{name}")[-1] for name in ("vectors_of_segment", "stop_probability"))
    assert (lengths.step, lengths.histogram_value.num, stop.histogram_value.num) == (6, 18, 36)
    assert lengths.histogram_value.sum / 18 == pytest.approx(real)
    assert 0 < expected < 2
    middles = [
        (end - 0.01) * count for end, count in zip(stop.histogram_value.bucket_limit, stop.histogram_value.bucket)
    ]
    assert sum(middles) / 36 == pytest.approx(stop.histogram_value.sum / 36)
    # E[length] = (1 - p_1) + (1 - p_1)(1 - p_2), with much the same p at every step
    p = stop.histogram_value.sum / 36
    assert expected == pytest.approx((1 - p) + (1 - p) ** 2, abs=0.1)
    assert "train/vectors" in events.Tags()["scalars"]


@pytest.mark.parametrize("name", ["autocompressor", "autocompressor_variable"])
def test_every_command_runs(name: str, tiny_folder: Path, tmp_path: Path) -> None:
    config = cases.CASES[name](tiny_folder, dropout=0.0)
    config["trainer"]["max_epochs"] = 1
    run = tmp_path / "run"
    assert cases.fit(config, run) == 0
    found = result(run)
    arms = {"no_context", "full", "after_1", "after_2", "base_no_context", "base_full"}
    assert set(found["arms"]) == arms | ({"soft"} if "variable" in name else set())
    assert {"loss", "perplexity", "answer_loss", "kv_share", "kv_tokens_peak", "vectors"} <= set(found["metrics"])
    assert set(found["differences"]["loss"]) == set(found["arms"])
    assert found["data"]["splits"] == {"train": 24, "val": 6, "test": 7}
    if "variable" in name:
        lengths_are_logged(run)
    for command in ("validate", "predict"):
        assert cases.main([command, "--run", str(run), "--eval_name", command]) == 0
        lines = (run / "eval" / command / "predictions.jsonl").read_text().splitlines()
        assert len(lines) == (6 if command == "validate" else 7)
    options = ["--data", "kvc.data.demonstrations.Demonstrations", "--data.path", "synthetic:in_context"]
    counted = ["--data.count", "4", "--data.demonstrations", "4"]
    assert cases.main(["test", "--run", str(run), "--eval_name", "icl", *options, *counted]) == 0
    assert {"accuracy", "kv_share", "kv_tokens_context"} <= set(result(run / "eval" / "icl")["metrics"])
    loaded: Any = kvc.load(run)
    prompt = loaded.as_model().compress_context(torch.arange(10, 30)[None])
    assert prompt.vectors.shape == (1, int(prompt.lengths), 32)
    assert "variable" in name or int(prompt.lengths) == 3


def test_a_full_model_goes_on_where_it_was_killed(tiny_folder: Path, tmp_path: Path) -> None:
    config = cases.autocompressor_config(tiny_folder)
    del config["model"]["init_args"]["backbone"]["lora"]
    config["trainer"]["max_epochs"] = 1
    assert cases.fit(config, tmp_path / "whole") == 0
    cases.fit_killed(config, tmp_path / "killed", 4, "--save_every", "2")
    assert cases.fit(config, tmp_path / "killed", "--save_every", "2") == 0
    one, two = (cases.checkpoint(tmp_path / run) for run in ("whole", "killed"))
    for key in ("state_dict", "optimizer_states"):
        assert cases.same_bits(one[key], two[key], key) == []
