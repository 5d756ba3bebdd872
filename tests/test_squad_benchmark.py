"""The benchmark of context compressors runs in small, and its figures mean what they say."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from experiments.benchmarks import break_even, rounds
from experiments.benchmarks import squad as benchmark
from experiments.benchmarks.break_even import Cost
from experiments.benchmarks.squad_models import KEEPERS, SHAPES, TRAINED, WAYS, Sizes, draw
from experiments.benchmarks.squad_serving import costs, serving
from experiments.benchmarks.squad_training import training
from kvc.errors import UserError

FIELDS: dict[str, Any] = {
    "vocab_size": 1536,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
ROW = 2 * 2 * 2 * 8 * 4
"""Bytes of keys and values: 2 layers, 2 KV heads of 8, float32."""
SIZES = Sizes("tiny", 2, 24, 3, 5, 4, 4.0, 16)


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "tiny", FIELDS)


def test_what_reading_leaves_in_memory() -> None:
    arms, memories = serving(SIZES, list(WAYS), "cpu")
    rows = {"full": 3 + 24, "slots": 3 + 6, "anchors": 3 + 6, "gist": 6}
    assert {name: memory.tokens.tolist() for name, memory in memories.items()} == {
        name: [count] * 2 for name, count in rows.items()
    }
    for name, count in rows.items():
        # Positions beside keys and values.
        assert 2 * count * ROW < memories[name].bytes < 2.2 * count * ROW
    compressing = {f"compress_{way}" for way in WAYS if way not in KEEPERS}
    assert {name for name in arms if name.startswith("compress_")} == compressing
    for name in compressing:
        slots = arms[name]().slots
        assert slots.slots.shape == (2, 8, 32)
        # 24 tokens in pieces of 16 and 8.
        assert slots.mask.sum(1).tolist() == [6, 6]


def test_answers_after_the_full_text_are_those_of_the_model() -> None:
    arms, memories = serving(SIZES, ["mean_pool"], "cpu")
    model: Any = arms["answer_full"].args[0]  # type: ignore[attr-defined]
    batch = draw(SIZES, FIELDS["vocab_size"], "cpu")
    before = memories["full"].bytes
    said = arms["answer_full"]()
    whole = torch.cat([batch["head_ids"], batch["context_ids"], batch["tail_ids"]], dim=1)
    settings = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = model.generate(whole, attention_mask=torch.ones_like(whole), **settings)
    assert said.tokens == expected[:, whole.shape[1] :].tolist()
    assert memories["full"].bytes == before
    assert [len(row) for row in arms["first_slots"]().tokens] == [1, 1]


@pytest.mark.parametrize("name", TRAINED)
def test_steps_train_what_is_trained(name: str) -> None:
    ((_, arm),) = training(SIZES, [name], "cpu").items()
    method = arm.args[0]  # type: ignore[attr-defined]
    assert arm() > 0
    assert method.compressor is None or all(p.grad is not None for p in method.compressor.parameters())
    adapters = [p for n, p in method.named_parameters() if ".lora_B" in n]
    assert adapters
    assert any(float(p.grad.abs().max()) > 0 for p in adapters if p.grad is not None)
    assert not any(p.requires_grad for n, p in method.backbone.named_parameters() if ".lora_" not in n)


def test_the_command_writes_every_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A fresh process takes seconds to import torch.
    monkeypatch.setattr(benchmark, "_in_child", lambda part, sizes, names: dict.fromkeys([*names, part], 2**20))
    out = tmp_path / "out.json"
    words = ["--device", "cpu", "--rounds", "1", "--batches", "2", "--contexts", "32", "16", "--ratio", "4"]
    words += ["--new_tokens", "3", "--questions", "1", "9", "--train_batch", "1", "--train_context", "16"]
    ways = ["mean_pool", "anchors"]
    benchmark.main(["--out", str(out), *words, "--compressors", *ways, "--trained", "full_text", "mean_pool"])
    result = json.loads(out.read_text(encoding="utf-8"))
    cases = result["serving"]["cases"]
    assert [(case["batch"], case["context"]) for case in cases] == [(2, 16), (2, 32)]
    for case in cases:
        assert case["kv_share"]["full"] == 1 > case["kv_share"]["slots"]
        for unit in rounds.UNITS:
            found = case[unit]
            assert set(found["ratio_to_read_full"]) == {"compress_mean_pool", "read_slots", "read_anchors"}
            assert set(found["ratio_to_answer_full"]) == {"answer_slots", "answer_anchors"}
            assert set(found["seconds_per_token"]) == {"full", "slots", "anchors"}
            assert list(found["break_even"]) == ways
            assert all(set(modes) == {"kept", "reread"} for modes in found["break_even"].values())
            seconds = found["seconds"]["read_full"]
            assert 0 < seconds["low"] <= seconds["value"] <= seconds["high"]
    pays = result["serving"]["break_even"]
    assert [(one["batch"], one["unit"]) for one in pays] == [(2, "wall"), (2, "processor")]
    assert set(pays[0]["length"]["anchors"]["kept"]) == {"1", "9"}
    control, ours = result["training"]
    assert (control["method"], ours["method"]) == ("full_text", "mean_pool")
    assert ours["tokens"] == 4 + 16 + 24 + 3
    assert ours["compressor_parameters"] == 32 * 32 + 2 * 32 > control["compressor_parameters"] == 0
    assert set(ours["wall"]) == {"seconds", "tokens_per_second", "ratio_to_full_text"}
    assert result["device"]


def test_costs_count_what_is_done_once_and_for_each_question() -> None:
    seconds = {"read_full": 8, "answer_full": 4, "compress_mean_pool": 9, "read_slots": 1, "answer_slots": 3}
    seconds |= {"read_gist": 10, "answer_gist": 2}
    found = {name: np.array([float(value)]) for name, value in seconds.items()}
    made = {mode: [cost.total(2).item() for cost in pair] for mode, pair in costs(found, "mean_pool").items()}
    assert made == {"kept": [9 + 1 + 2 * 3, 8 + 2 * 4], "reread": [9 + 2 * (1 + 3), 2 * (8 + 4)]}
    kept = {mode: [cost.total(2).item() for cost in pair] for mode, pair in costs(found, "gist").items()}
    assert kept == {"kept": [10 + 2 * 2, 8 + 2 * 4], "reread": [10 + 2 * 2, 2 * (8 + 4)]}


def test_questions_that_pay() -> None:
    def at(ours: tuple[float, float], other: tuple[float, float]) -> float:
        made, full = (Cost(np.array([once]), np.array([each])) for once, each in (ours, other))
        return float(break_even.questions(made, full)[0])

    assert at((10, 1), (4, 3)) == 3
    assert at((10, 3), (4, 3)) == np.inf
    assert at((10, 4), (4, 3)) == np.inf
    assert at((4, 1), (4, 3)) == 0
    assert at((4, 4), (4, 3)) == 0


def test_lengths_that_pay() -> None:
    def at(*extra: float) -> float:
        lengths = [100, 200, 400][: len(extra)]
        return float(break_even.length(lengths, [np.array([value]) for value in extra])[0])

    assert at(3.0, 1.0, -1.0) == 300
    assert at(1.0, -3.0, -9.0) == 125
    assert at(-1.0, -2.0, -3.0) == 100
    assert at(3.0, 2.0, 1.0) == np.inf
    assert at(-1.0, -1.0, 1.0) == np.inf
    assert at(1.0, -1.0, 1.0) == np.inf
    # The last change counts.
    assert at(-1.0, 1.0, -1.0) == 300


def test_figures_with_intervals(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    def timed(arm: Any, device: str) -> dict[str, float]:
        order.append(arm())
        value = float(len(order))
        return {"wall": value, "processor": 10 * value}

    monkeypatch.setattr(rounds, "timed", timed)
    found = rounds.run({"a": lambda: "a", "b": lambda: "b"}, 3, "cpu")
    assert order == ["a", "b", "b", "a", "a", "b"]
    median = rounds.medians(found, "processor")
    assert [median[name][0] for name in "ab"] == [40, 30]
    # Rounds are drawn together: the ratio of one round is 1 / 2, 4 / 3 or 5 / 6.
    ratio = rounds.described(median["a"] / median["b"])
    assert (ratio["value"], ratio["low"], ratio["high"]) == (1.333, 0.5, 1.333)
    never = rounds.described(np.array([2.0, *[1.0] * 90, *[np.inf] * 10]))
    assert never == {"value": 2, "low": 1, "high": None}
    assert rounds.described(np.array([np.inf, np.nan, 3.0])) == {"value": None, "low": 3, "high": None}


def test_what_cannot_be_measured_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    out = ["--out", str(tmp_path / "x.json")]
    with pytest.raises(UserError, match="--device: there is no CUDA device"):
        benchmark.main([*out, "--device", "cuda"])
    with pytest.raises(UserError, match="--shape: llama8b needs --device cuda"):
        benchmark.main([*out, "--device", "cpu", "--shape", "llama8b"])
