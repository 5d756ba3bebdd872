import argparse
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from experiments.benchmarks import decode, kvpress_worker
from experiments.benchmarks.kvpress_worker import Cell, Plain, Prefix, Watch, measure, run
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
    "initializer_range": 0.3,
}
CELL = Cell(batch=2, length=40, lead=10, new=16, budget=16, interval=8)
ROW = 2 * 2 * 2 * 8 * 4
"""Bytes of a token: keys and values, 2 layers, 2 KV heads of 8, float32."""


@pytest.fixture(autouse=True)
def without_collecting(monkeypatch: pytest.MonkeyPatch) -> None:
    """To look through all that pytest holds takes longer than the runs."""
    monkeypatch.setattr(kvpress_worker.gc, "collect", lambda: 0)
    monkeypatch.setattr(kvpress_worker.gc, "freeze", lambda: None)


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**FIELDS)).eval().requires_grad_(False)


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """A grid of one cell on the small model."""
    monkeypatch.setattr(decode, "SHAPES", {"small": FIELDS})
    monkeypatch.setattr(decode, "GRIDS", {"small": {"small": ([2], [40])}})
    monkeypatch.setattr(decode, "SIZES", {"small": (16, 8)})
    monkeypatch.setattr(decode, "overhead_cells", lambda: [Cell(2, 16, lead=2, new=4)])


def answers(model: LlamaForCausalLM) -> tuple[Prefix, dict[str, Any]]:
    prefix = Prefix(model, CELL)
    return prefix, {name: run(side, prefix, CELL, record=True) for name, side in decode.grid_sides(model).items()}


def test_the_sides_decode_the_same_prompt_and_count_the_same_way(model: LlamaForCausalLM) -> None:
    expected = model.generate(
        Prefix(model, CELL).ids, max_new_tokens=26, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    _, found = answers(model)
    assert found["hf_full"]["tokens"] == found["kvc_full"]["tokens"] == expected[:, 40:].tolist()
    assert len({token for row in found["hf_full"]["tokens"] for token in row}) > 4
    full, ours = found["hf_full"]["memory"], found["kvc_full"]["memory"]
    rows = 40 + 26 - 1
    assert full["rows_at_the_end"] == ours["rows_at_the_end"] == [rows, rows]
    assert full["kv_bytes"] == {"peak": 2 * rows * ROW, "peak_timed": 2 * rows * ROW, "end": 2 * rows * ROW}
    assert ours["kv_bytes"]["peak"] >= full["kv_bytes"]["peak"]  # positions are held too
    assert full["mean_rows_timed"] == ours["mean_rows_timed"] == sum(range(40 + 10, 40 + 26)) / 16
    assert full["compressions"] == ours["compressions"] == {"all": 0, "timed": 0}


def test_evicting_sides_are_timed_in_the_steady_state(model: LlamaForCausalLM) -> None:
    prefix, found = answers(model)
    for name in ("kvc_rkv", "kvc_snapkv", "kvc_tova", "kvc_knorm", "kvc_streaming_llm"):
        memory = found[name]["memory"]
        assert memory["compressions"] == {"all": 3, "timed": 2}, name
        # Compressed after forwards 9, 17 and 25; one more follows.
        assert memory["rows_at_the_end"] == [17, 17], name
        assert memory["kv_bytes"]["peak"] >= 2 * 48 * ROW > memory["kv_bytes"]["peak_timed"] >= 2 * 24 * ROW
        assert 16 < memory["mean_rows_timed"] <= 24, name
    queries = {name: answer["memory"]["aside_bytes_peak"] for name, answer in found.items()}
    assert queries["kvc_rkv"] == 2 * 2 * 4 * 8 * 8 * 4  # rows, layers, heads, window, width, float32
    assert queries["kvc_knorm"] == queries["kvc_full"] == queries["hf_full"] == 0
    assert prefix.rows[0][0].shape == (2, 2, 39, 8)


def test_a_run_leaves_the_prompt_as_it_was(model: LlamaForCausalLM) -> None:
    prefix = Prefix(model, CELL)
    before = [part.clone() for rows in prefix.rows for part in rows]
    for side in decode.grid_sides(model).values():
        run(side, prefix, CELL)
    assert all(torch.equal(a, b) for a, b in zip(before, (part for rows in prefix.rows for part in rows)))


def test_a_prompt_read_in_parts_is_the_same(model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Prefix(model, CELL)
    monkeypatch.setattr(kvpress_worker, "PREFILL_TOKENS", 40)
    parts = Prefix(model, CELL)
    for one, other in zip(whole.rows, parts.rows):
        torch.testing.assert_close(one, other)


def test_the_clock_starts_after_the_lead_and_leaves_no_hook(model: LlamaForCausalLM) -> None:
    with Watch(model, lead=2) as watch:
        model(torch.tensor([[5]]))
        assert len(model._forward_hooks) == 1
        assert watch._start is None
        model(torch.tensor([[5]]))
        assert len(model._forward_hooks) == 0
        assert watch._start is not None
    assert watch.seconds["wall"] > 0
    with pytest.raises(RuntimeError, match="2 forwards before"), Watch(model, lead=3):
        model(torch.tensor([[5]]))
    assert len(model._forward_hooks) == 0


def test_a_twin_shares_weights_and_no_hooks(model: LlamaForCausalLM) -> None:
    other = decode.twin(model)
    assert all(a is b for a, b in zip(model.parameters(), other.parameters()))
    decode.Loop(other).cache(Prefix(model, CELL))
    assert len(other.model._forward_pre_hooks) == 1
    assert len(model.model._forward_pre_hooks) == 0


def test_medians_ratios_and_arms_that_fail() -> None:
    runs = {"a": iter([1.0, 2.0, 4.0]), "b": iter([3.0, 4.0, 16.0])}
    order: list[str] = []

    def arm(name: str, record: bool) -> dict[str, Any]:
        if record:
            return {"error": "cannot"} if name == "c" else {"seconds": {}, "tokens": [[1]], "memory": {}}
        order.append(name)
        value = next(runs[name])
        return {"seconds": {"wall": value, "processor": 2 * value}}

    arms = {name: (lambda record, name=name: arm(name, record)) for name in ("a", "c", "b")}
    result = measure(arms, CELL, 3, tick=lambda name: None)
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert list(result["sides"]) == ["a", "c", "b"]
    assert result["sides"]["c"] == {"error": "cannot"}
    b = result["sides"]["b"]
    assert b["seconds"] == {"wall": 4.0, "processor": 8.0}
    assert b["tokens_per_second"] == 2 * 16 / 4
    assert b["ratio"]["wall"] == 3.0  # the median of 3, 2 and 4
    assert b["ratio_range"]["wall"] == [2.0, 4.0]
    assert b["same_tokens"]


def test_roofline_of_an_8b_llama() -> None:
    config = LlamaConfig(**decode.SHAPES["llama8b"])
    row = decode.row_bytes(config, itemsize=2)
    assert row == 131072
    assert decode.step_bytes(1000, row, batch=4, rows=100.5) == 1000 + 4 * 100.5 * 131072


def test_weights_that_a_step_reads(model: LlamaForCausalLM) -> None:
    everything = sum(weight.numel() for weight in model.parameters())
    assert decode.weight_bytes(model) == 4 * (everything - 96 * 32)
    tied = LlamaForCausalLM(LlamaConfig(**FIELDS, tie_word_embeddings=True))
    assert decode.weight_bytes(tied) == 4 * (everything - 96 * 32)


def test_share_of_the_bandwidth(model: LlamaForCausalLM) -> None:
    side: dict[str, Any] = {"seconds": {"wall": 0.5}, "memory": {"mean_rows_timed": 10}}
    result = {"batch": 2, "new": 10, "sides": {"x": side, "y": {"error": "failed"}}}
    size = decode.weight_bytes(model) + 2 * 10 * ROW
    decode.add_roofline(result, model, bandwidth=100 * size)
    assert side["bytes_per_step"] == size
    # 20 steps a second of 100 that fit
    assert side["roofline_share"] == pytest.approx(0.2, rel=0.1)
    assert result["sides"]["y"] == {"error": "failed"}


def test_the_command_writes_all_parts(short: None, tmp_path: Path) -> None:
    out = tmp_path / "decode.json"
    decode.main(["--out", str(out), "--shape", "small", "--rounds", "1", "--overhead_rounds", "1", "--device", "cpu"])
    result = json.loads(out.read_text(encoding="utf-8"))
    assert set(result["overhead"][0]["sides"]) == {"hf_full", "kvc_full", "kvc_rkv_unreached"}
    assert all(side["same_tokens"] for side in result["overhead"][0]["sides"].values())
    assert {f"kvc_{policy}" for policy in decode.POLICIES} < set(result["grid"][0]["sides"])
    assert result["shapes"]["small"]["kvpress"] is None
    assert result["device"]
    assert result["versions"]["torch"]


def test_a_cell_that_does_not_fit_is_skipped(
    short: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(decode, "available_bytes", lambda device: 1000)
    out = tmp_path / "decode.json"
    decode.main(["--out", str(out), "--shape", "small", "--parts", "grid", "--device", "cpu"])
    (cell,) = json.loads(out.read_text(encoding="utf-8"))["grid"]
    assert cell["sides"] == {}
    assert cell["note"].startswith("skipped")
    assert "skipped" in capsys.readouterr().out


def test_the_worker_answers_with_the_same_tokens(
    model: LlamaForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kvpress_worker, "presses", lambda: {"none": None})
    monkeypatch.setattr(kvpress_worker, "versions", lambda: {"kvpress": "0"})
    model.save_pretrained(tmp_path)
    worker = kvpress_worker.Worker({"folder": str(tmp_path), "device": "cpu", "dtype": "float32"})
    request = {"side": "none", "cell": kvpress_worker.asdict(CELL), "record": True}
    out = io.StringIO()
    worker.serve([json.dumps(request), json.dumps({**request, "side": "unknown"})], out.write)
    first, answer, broken = (json.loads(line) for line in out.getvalue().splitlines())
    assert first == {"versions": {"kvpress": "0"}}
    assert answer["tokens"] == run(Plain(model), Prefix(model, CELL), CELL, record=True)["tokens"]
    assert broken == {"error": "KeyError: 'unknown'"}


def test_an_interpreter_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--kvpress_python: cannot start"):
        decode.Kvpress(str(tmp_path / "missing"), {}, tmp_path)
    with pytest.raises(UserError, match="--kvpress_python: the other process has ended"):
        decode.Kvpress("/bin/false", {}, tmp_path)


def test_what_every_memory_must_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    free = {"cpu": 10.0, "cuda": 10.0}
    monkeypatch.setattr(decode, "available_bytes", lambda memory: free[memory] * 2**30)
    cell = Cell(batch=1, length=1000, lead=10, new=14)
    assert decode.too_large(cell, 2**20, "cpu") is None
    assert decode.too_large(cell, 2**21, "cpu") == "skipped: 5 caches of 2.0 GiB do not fit into cpu memory"
    assert decode.too_large(cell, 2**21, "cuda") is None
    free["cuda"] = 4.0
    assert str(decode.too_large(cell, 2**21, "cuda")).endswith("cuda memory")


def test_the_8b_shape_needs_a_gpu(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--shape: llama8b"):
        decode.main(["--out", str(tmp_path / "x.json"), "--shape", "llama8b", "--device", "cpu"])


def test_two_timed_compressions_a_cell() -> None:
    options = argparse.Namespace(grid="full", batches=None, lengths=[64])
    cells = decode.grid_cells(options, "llama8b")
    assert {cell.batch for cell in cells} == {1, 8, 64}
    assert all((cell.lead, cell.new, cell.length) == (130, 256, 64) for cell in cells)
