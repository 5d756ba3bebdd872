"""The AutoCompressor benchmark runs in small, and both forms of a step are the same step."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.benchmarks import autocompressor as benchmark
from kvc.errors import UserError

FIELDS: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
}
SIZES = benchmark.Sizes("small", 2, 2, 6, 3)


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(benchmark.SHAPES, "small", FIELDS)


def test_all_forms_of_a_step_are_the_same_step() -> None:
    compressor = benchmark.make_compressor(SIZES, "cpu")
    ids = benchmark.draw(SIZES, 3, "cpu")
    found = {}
    for arm in benchmark.ARMS:
        loss = benchmark.step(compressor, arm, ids, SIZES, 3)
        found[arm] = loss, [p.grad.clone() for p in benchmark.parameters(compressor)]
    for arm in ("checkpointed", "plain"):
        assert found[arm][0] == pytest.approx(found["ours"][0], rel=1e-5)
        for one, other in zip(found[arm][1], found["ours"][1], strict=True):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)
    assert float(found["ours"][1][-1].abs().max()) > 0


def test_the_command_writes_its_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A fresh process takes seconds to import torch.
    monkeypatch.setattr(benchmark, "peak_bytes", lambda *arguments: 2**20)
    out = tmp_path / "out.json"
    words = ["--device", "cpu", "--rounds", "1", "--length", "6", "--summary", "3", "--substeps", "1", "2"]
    benchmark.main(["--out", str(out), *words])
    result = json.loads(out.read_text(encoding="utf-8"))
    assert [(case["substeps"], case["tokens"]) for case in result["training"]] == [(1, 12), (2, 24)]
    for case in result["training"]:
        assert set(case["ratio_to_ours"]) == {"checkpointed", "plain"}
        assert case["loss"]["plain"] == pytest.approx(case["loss"]["ours"], abs=1e-4)
    assert result["device"]
    assert not torch.distributed.is_initialized()


def test_cuda_is_refused_where_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="--device: there is no CUDA device"):
        benchmark.main(["--out", str(tmp_path / "x.json"), "--device", "cuda"])
