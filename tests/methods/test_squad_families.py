"""Base models of other families: grouped heads, an untied LM head, scaled embeddings."""

from pathlib import Path
from typing import Any

import pytest
import torch
from squad_tiny import batch, method, squad
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma3TextConfig, Qwen2Config

from kvc.methods.squad import FixedRatio, MeanPool, Source
from kvc.methods.squad.scale import relative_rms

SHAPE = {
    "vocab_size": 1536,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
FAMILIES: dict[str, Any] = {
    "qwen2": lambda: Qwen2Config(**SHAPE, tie_word_embeddings=False),
    "gemma3": lambda: Gemma3TextConfig(**SHAPE, head_dim=8, sliding_window=512),
}


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: Any, tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    found = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(FAMILIES[request.param]()).save_pretrained(found)
    AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(found)
    return found


@torch.no_grad()
def test_a_slot_for_every_token_is_the_plain_model(folder: Path) -> None:
    def plain(width: int, rms: float) -> MeanPool:
        return MeanPool(width, rms, project=False, norm=False)

    made = method(folder, noise=0.0, compressor=plain, budget=FixedRatio(1), source=Source("embeddings")).eval()
    base, data, loss = AutoModelForCausalLM.from_pretrained(folder).eval(), batch(squad(folder), [0, 1, 2]), 0.0
    for row in range(3):
        parts = [data[f"{part}_ids"][row][data[f"{part}_mask"][row]] for part in ("head", "context", "tail", "answer")]
        size = len(parts[-1])
        logits = base(torch.cat(parts)[None]).logits[0, -size - 1 : -1]
        loss += float(F.cross_entropy(logits, parts[-1], reduction="sum"))
    assert float(made.step(data).loss_sum) == pytest.approx(loss, rel=1e-4)


@pytest.mark.parametrize("name", ["latent", "anchors"])
def test_a_batch_is_its_rows_and_trains(name: str, folder: Path) -> None:
    made, data = method(folder, name).eval(), squad(folder)
    with torch.no_grad():
        rows = sum(float(made.step(batch(data, [row])).loss_sum) for row in range(3))
        assert float(made.step(batch(data, [0, 1, 2])).loss_sum) == pytest.approx(rows, rel=1e-4)
        slots = made.read(batch(data, [0, 1, 2])).slots
    if slots is not None:
        tokens = made.backbone.get_input_embeddings()(torch.arange(1536)[None])
        size = float(tokens.detach().square().mean().sqrt())
        assert float(relative_rms(slots.slots, slots.mask, size)) == pytest.approx(1, rel=0.1)
    made.train().step(batch(data, [0, 1], "train")).loss_sum.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in made.compressor.parameters())
