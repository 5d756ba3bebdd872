"""A tiny model, questions about made-up passages, and compressors that fit them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from kvc.core.backbone import Backbone, Lora
from kvc.data.squad import Squad
from kvc.methods.squad import (
    Anchors,
    ContextCompressor,
    Convolution,
    CrossAttention,
    FixedRatio,
    Latent,
    MeanPool,
    Source,
    WeightedPooling,
)

MAKERS: dict[str, Callable[[int, float], Any]] = {
    "cross_attention": lambda width, rms: CrossAttention(width, rms, slots=64, dropout=0.0),
    "convolution": lambda width, rms: Convolution(width, rms, slots=64),
    "pooling": lambda width, rms: WeightedPooling(width, rms, slots=64),
    "latent": lambda width, rms: Latent(width, rms, slots=64, dropout=0.0),
    "mean_pool": MeanPool,
    "anchors": Anchors,
}
SLOTS = [name for name in MAKERS if name != "anchors"]


def method(folder: Path, name: str = "mean_pool", noise: float = 0.1, **settings: Any) -> ContextCompressor:
    """With adapters that do something, unless `lora=None`."""
    lora = settings.pop("lora", Lora(r=4, dropout=0.0))
    backbone = Backbone(pretrained=str(folder), lora=lora, **settings.pop("backbone", {}))
    if settings.get("mode", "compress") == "compress":
        settings = {"compressor": MAKERS[name], "budget": FixedRatio(4)} | settings
        if name != "anchors":
            settings = {"source": Source(frozen=lora is None)} | settings
    made = ContextCompressor(backbone, max_new_tokens=5, **settings)
    generator = torch.Generator().manual_seed(1)
    for key, parameter in made.named_parameters():
        if ".lora_B." in key or key == "compressor.mark":
            parameter.data = torch.randn(parameter.shape, generator=generator) * noise
    return made


def squad(folder: Path, **settings: Any) -> Squad:
    """Short passages; the data have the tokenizer of the model."""
    data = Squad(**{"counts": (8, 4, 6), "facts": (2, 6), "batch_size": 4, **settings})
    data.tokenizer = AutoTokenizer.from_pretrained(folder)
    return data


def batch(data: Squad, rows: list[int], split: Any = "test") -> dict[str, Any]:
    """Rows of a split, together."""
    dataset = data.dataset(split)
    return data.collate(split)([dataset[(0, row)] for row in rows])
