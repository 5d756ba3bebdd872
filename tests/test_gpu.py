"""What runs on a GPU gives what the CPU gives, within the precision of bf16."""

import json

import pytest
import torch

from kvc.__main__ import main

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SHARED = {
    "data": {"class_path": "kvc.data.comp.CompTraces", "init_args": {"counts": [64, 16, 16], "batch_size": 16}},
    "model": {"class_path": "kvc.methods.comp.CompClassifier", "init_args": {"optim": {"lr": 0.001}}},
}


def run(tmp_path, name, accelerator, precision):
    config = tmp_path / f"{name}.json"
    trainer = {"accelerator": accelerator, "devices": 1, "precision": precision, "max_epochs": 5}
    config.write_text(json.dumps({**SHARED, "trainer": trainer}))
    assert main(["fit", "--config", str(config), "--run_dir", str(tmp_path / name)]) == 0
    return json.loads((tmp_path / name / "result.json").read_text())["metrics"]["average_precision"]["value"]


def test_comp_on_gpu_equals_cpu(tmp_path, monkeypatch):
    monkeypatch.setenv("KVC_CACHE", str(tmp_path / "cpu"))
    on_cpu = run(tmp_path, "on_cpu", "cpu", "32-true")
    monkeypatch.setenv("KVC_CACHE", str(tmp_path / "gpu"))
    on_gpu = run(tmp_path, "on_gpu", "gpu", "bf16-mixed")
    assert on_gpu == pytest.approx(on_cpu, abs=0.05)
