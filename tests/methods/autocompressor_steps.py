"""A small AutoCompressor method, and batches for it."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from kvc.core.backbone import Backbone, Lora
from kvc.core.method import StepOutput
from kvc.methods.autocompressor import AutoCompressor
from kvc.methods.autocompressor.summaries import Fixed

TOKENS = 40


def method(tiny_folder: Path, lora: bool = False, **settings: Any) -> AutoCompressor:
    backbone = Backbone(pretrained=str(tiny_folder), lora=Lora(r=2, dropout=0.0) if lora else None)
    settings.setdefault("summary", Fixed(3) if settings.get("mode", "compress") == "compress" else None)
    made = AutoCompressor(backbone, **settings)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in made.named_parameters():
        if ".lora_B." in name or name.startswith("summary."):
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    return made


def batch(rows: int = 3, ragged: bool = True) -> dict[str, torch.Tensor]:
    """Right-padded; padding holds ordinary ids, so that a leak shows."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, 1200, (rows, TOKENS), generator=generator)
    lengths = torch.tensor([TOKENS, 35, 21][:rows]) if ragged else torch.full((rows,), TOKENS)
    mask = (torch.arange(TOKENS) < lengths[:, None]).long()
    return {
        "id": torch.arange(rows),
        "input_ids": ids,
        "attention_mask": mask,
        "labels": ids.masked_fill(mask == 0, -100),
        "answer": torch.arange(TOKENS).expand(rows, -1) % 7 == 0,
        "fact": torch.arange(TOKENS).expand(rows, -1) % 5 == 0,
    }


def at_step(made: AutoCompressor, step: int = 0) -> AutoCompressor:
    """As if a trainer ran it."""
    made._trainer = SimpleNamespace(global_step=step)  # type: ignore[assignment]
    return made


def with_control_tokens(source: Path, folder: Path) -> Path:
    """A base model whose tokenizer has `<sum>` and `<eoc>`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(source)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<sum>", "<eoc>"]})
    model = AutoModelForCausalLM.from_pretrained(source)
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def pieces(made: AutoCompressor, data: Any, step: int = 0) -> list[StepOutput]:
    return [piece() for piece in at_step(made, step).substeps(data)]
