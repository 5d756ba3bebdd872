"""Training steps of context compressors and of their control."""

from contextlib import nullcontext
from functools import partial
from typing import Any

import torch

from experiments.benchmarks.meters import Arm
from experiments.benchmarks.squad_models import Sizes, backbone, draw, maker
from kvc.core.backbone import Lora
from kvc.core.seeds import DEFAULT_SEED
from kvc.methods.squad import ContextCompressor, FixedRatio, Source

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def training(sizes: Sizes, names: list[str], device: str) -> dict[str, Arm]:
    """One arm for each method: forward and backward of a step; gradients are there afterwards."""
    arms: dict[str, Arm] = {}
    for name in names:
        torch.manual_seed(DEFAULT_SEED)
        base = backbone(
            sizes,
            device,
            lora=Lora(r=16, alpha=32, dropout=0.0, targets=LINEAR),
            gradient_checkpointing=device == "cuda" and name != "anchors",
        )
        settings: dict[str, Any] = {"mode": "full_text"}
        if name != "full_text":
            settings = {"compressor": maker(name, sizes), "budget": FixedRatio(sizes.ratio)}
            settings |= {} if name == "anchors" else {"source": Source(frozen=False)}
        with torch.device(device):
            method = ContextCompressor(base, max_length=sizes.max_length, **settings)
        method.train()
        batch = draw(sizes, method.backbone.config.vocab_size, device)
        arms[name] = partial(step, method, batch)
    return arms


def step(method: ContextCompressor, batch: dict[str, Any]) -> float:
    """Loss of an answer token."""
    method.zero_grad()
    device = method.backbone.device.type
    with torch.autocast(device, torch.bfloat16) if device == "cuda" else nullcontext():
        output = method.step(batch)
        loss = output.loss_sum / output.num_tokens
    loss.backward()
    return float(loss.detach())


def weights(method: ContextCompressor) -> dict[str, float]:
    """Parameter counts, and what all weights take."""
    held = sum(tensor.nbytes for tensor in (*method.parameters(), *method.buffers()))
    return {**method.sizes(), "weights_mib": round(held / 2**20, 2)}
