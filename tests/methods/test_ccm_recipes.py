"""The configurations of large models run as they stand, on a tiny model and a CPU."""

import json
from pathlib import Path

import pytest
import yaml

from kvc.__main__ import main
from kvc.data.traces import synthetic_traces

ROOT = Path(__file__).resolve().parents[2]
SMALL = {
    "--trainer.accelerator": "cpu",
    "--trainer.max_steps": "4",
    "--trainer.accumulate_grad_batches": "2",
    "--trainer.val_check_interval": "2",
    "--model.backbone.dtype": "float32",
    "--data.train_ratio": "0.6",
}


@pytest.mark.parametrize("recipe", ["llama31_8b", "llama2_7b"])
def test_a_recipe_trains(recipe: str, tiny_folder: Path, tmp_path: Path) -> None:
    traces = tmp_path / "traces.jsonl"
    records = [trace.record() for trace in synthetic_traces(10, 1, "train", (2, 4))]
    traces.write_text("\n".join(json.dumps(record) for record in records))
    options = {**SMALL, "--model.backbone.pretrained": str(tiny_folder), "--data.path": str(traces)}
    config = str(ROOT / "configs" / "ccm" / f"{recipe}.yaml")
    flat = [part for pair in options.items() for part in pair]
    assert main(["fit", "--config", config, "--run_dir", str(tmp_path / "run"), *flat]) == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["samples"] == 2
    assert set(result["arms"]) == {"full", "no_context", "untrained"}
    written = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert written["trainer"]["precision"] == "bf16-mixed"
    assert [one["class_path"] for one in written["trainer"]["callbacks"]] == ["kvc.callbacks.early_stopping.StopEarly"]
    assert written["model"]["init_args"]["backbone"]["lora"]["r"] == 8
