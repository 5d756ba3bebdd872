"""The CCM benchmark runs in small, and its figures mean what they say."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.benchmarks import ccm, rounds
from kvc.errors import UserError
from kvc.methods.ccm.recurrent import CompressedMemory

FIELDS: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
}


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("small", "layer", "llama1b"):
        monkeypatch.setitem(ccm.SHAPES, name, FIELDS)


def run(tmp_path: Path, *words: str) -> dict[str, Any]:
    out = tmp_path / "ccm.json"
    ccm.main(["--out", str(out), "--device", "cpu", "--rounds", "1", "--chunk", "8", *words])
    return json.loads(out.read_text(encoding="utf-8"))


def gradients(compressor: Any) -> list[torch.Tensor]:
    return [p.grad for p in [*compressor.model.parameters(), compressor.tokens.table] if p.grad is not None]


@pytest.mark.parametrize("kind", ["concat_recur", "merge_recur"])
def test_both_forms_of_a_step_are_the_same_step(kind: Any) -> None:
    compressor = ccm.make_compressor("small", kind, "cpu")
    *chunks, tail = ccm.draw(compressor, 2, 5, 4, 6)
    found = {}
    for form in ("parallel", "stepwise"):
        loss = ccm.training_step(compressor, form, chunks, tail)
        found[form] = loss, [grad.clone() for grad in gradients(compressor)]
    assert found["parallel"][0] == pytest.approx(found["stepwise"][0], abs=1e-5)
    memory = CompressedMemory(compressor)
    for chunk in chunks:
        memory.compress(chunk)
    likely = memory.logits(tail).detach().log_softmax(-1)
    expected = -sum(likely[row, at, tail[row, at + 1]] for row in range(2) for at in range(5)) / 10
    assert found["parallel"][0] == pytest.approx(float(expected), abs=1e-5)
    for one, other in zip(found["parallel"][1], found["stepwise"][1], strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-3)
    assert float(found["parallel"][1][-1].abs().max()) > 0


def test_the_command_writes_every_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A fresh process takes seconds to import torch.
    monkeypatch.setattr(ccm, "peak_bytes", lambda *arguments: 2**20)
    result = run(
        tmp_path,
        *("--parts", "training", "generation", "mfu", "--segments", "2", "3", "--contexts", "32", "--new_tokens", "5"),
        *("--mfu_shapes", "llama1b", "--mfu_attention", "sdpa", "--mfu_chunk", "8", "--product", "64"),
    )
    assert [(case["kind"], case["segments"]) for case in result["training"]] == [
        *(("concat_recur", 2), ("concat_recur", 3), ("merge_recur", 2), ("merge_recur", 3))
    ]
    for case in result["training"]:
        assert case["loss"]["parallel"] == pytest.approx(case["loss"]["stepwise"], abs=1e-4)
        assert set(case["ratio_to_parallel"]) == {"stepwise"}
        assert case["peak_mib"] == {"parallel": 1.0, "stepwise": 1.0}
    (case,) = result["generation"]
    assert case["rows"] == {"full": 32, "concat": 8, "merge": 2}
    held = case["memory_bytes"]
    # Keys and values, 2 layers, 2 KV heads of 16, float32; positions beside them.
    assert held["full"] > 2 * 32 * 2 * 2 * 2 * 16 * 4 > held["concat"] > held["merge"]
    assert case["peak_bytes_while_decoding"]["full"] > held["full"]
    (share,) = result["mfu"]
    assert share["mfu"] == pytest.approx(share["tflops"] / share["device_tflops"], rel=0.5)
    assert result["device"]
    assert result["settings"]["slots"] == 2


def test_masks_of_both_forms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # To compile FlexAttention takes longer than all else.
    make = ccm.make_compressor
    monkeypatch.setattr(ccm, "make_compressor", lambda shape, kind, device, attention: make(shape, kind, device))
    result = run(tmp_path, "--parts", "masks", "--lengths", "512", "1024", "--segment", "256")
    assert [(case["kind"], case["length"]) for case in result["masks"]] == [
        *(("concat_recur", 512), ("concat_recur", 1024), ("concat", 512), ("concat", 1024))
    ]
    # 4 segments of two blocks: 8 x 8 blocks, of which each segment sees three of its own.
    recurrent, isolated = result["masks"][1], result["masks"][3]
    assert recurrent["blocks_skipped"] == round(1 - (4 * 3 + 2 * (2 + 4 + 6) / 2) / 64, 3)
    assert isolated["blocks_skipped"] == round(1 - (4 * 3 + 2 * 3) / 64, 3)
    assert set(recurrent["exponent"]["wall"]) == {"dense", "block", "dense_mask", "block_mask"}
    assert all(math.isfinite(slope) for slope in recurrent["exponent"]["wall"].values())


def test_exponents() -> None:
    assert ccm.exponent([1, 2, 4, 8], [3, 12, 48, 192]) == 2
    assert ccm.exponent([10, 100], [5, 50]) == 1


def test_arms_take_turns_and_the_first_is_the_base(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    seconds = {"a": iter([1.0, 2.0, 9.0]), "b": iter([3.0, 4.0, 5.0])}

    def timed(arm: Any, device: str) -> dict[str, float]:
        order.append(arm())
        value = next(seconds[order[-1]])
        return {"wall": value, "processor": 2 * value}

    monkeypatch.setattr(rounds, "timed", timed)
    result = ccm.race({"a": lambda: "a", "b": lambda: "b"}, 3, "cpu")
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert result["median_seconds"] == {"a": {"wall": 2, "processor": 4}, "b": {"wall": 4, "processor": 8}}
    assert result["ratio_to_a"] == {"b": {"wall": 2.0, "processor": 2.0}}


def test_operations_of_a_step() -> None:
    compressor = ccm.make_compressor("small", "full", "cpu", conditional=False)
    weights = 2 * (32 * 64 + 2 * 32 * 32 + 64 * 32 + 3 * 32 * 64)
    pairs = 5 * 6 // 2
    ids = torch.arange(5)[None]
    assert ccm.step_operations(compressor, ids) == 4 * weights * 5 + 12 * 2 * 64 * pairs


def test_cuda_is_refused_where_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="--device: there is no CUDA device"):
        ccm.main(["--out", str(tmp_path / "x.json"), "--device", "cuda"])
