"""A name for the weights of a loaded model, so that a memory is never read by another one."""

import hashlib
from collections.abc import Iterator
from pathlib import PurePath
from typing import Any

import torch
from transformers import PreTrainedModel

SAMPLES = 64
"""Values looked at in each parameter."""


def fingerprint(model: PreTrainedModel, adapters: bool = True) -> str:
    """16 hexadecimal digits that change with shape, precision, adapters and, practically always, any training.

    Looks at `SAMPLES` evenly spaced values of every parameter, so it takes milliseconds where a hash of all weights
    takes minutes. It tells models apart, it does not prove that nobody tampered with one.

    Args:
        model: A causal LM, with or without adapters, on any device.
        adapters: Whether its LoRA counts; without, the name is that of the model before it got one in place.
    """
    total = hashlib.sha256()
    values = []
    parameters = sorted(model.named_parameters() if adapters else _base_parameters(model))
    for name, parameter in parameters:
        total.update(f"{name} {[*parameter.shape]} {parameter.dtype}\n".encode())
        flat = parameter.detach().reshape(-1)
        where = torch.linspace(0, max(flat.numel() - 1, 0), min(SAMPLES, flat.numel()), dtype=torch.float64)
        values.append(flat[where.long().to(flat.device)].float().cpu())
    total.update(torch.cat(values).numpy().tobytes())
    return total.hexdigest()[:16]


def _base_parameters(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters that are not PEFT LoRA's, by the names they have without it."""
    for name, parameter in model.named_parameters():
        if ".lora_" not in name:
            yield name.replace(".base_layer.", "."), parameter


def display_name(model: PreTrainedModel) -> str:
    """The model's Hub id, or the last part of its path: where it lies on this machine is nobody's business."""
    name: Any = getattr(model.config, "_name_or_path", "") or type(model).__name__
    local = name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name
    return PurePath(name.replace("\\", "/")).name if local else str(name)
