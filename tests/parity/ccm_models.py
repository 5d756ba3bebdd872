"""The tiny models of the CCM reference, built from its weights."""

import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from kvc.methods.ccm.tokens import MemoryTokens


def build(folder: Path, model: str, slots: int, lora: bool = True, attention: str = "sdpa") -> tuple[Any, MemoryTokens]:
    """A model in eval mode and its memory tokens.

    Args:
        folder: Of the reference.
        model: `mha` or `gqa`.
        slots: Memory tokens in a run.
        lora: With the reference's LoRA.
        attention: Kernel.
    """
    shape = json.loads((folder / f"manifest_{model}.json").read_text())["_config"]
    weights = load_file(folder / f"weights_{model}.safetensors")
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    names += ("head_dim", "intermediate_size", "rms_norm_eps")
    config = LlamaConfig(
        **{name: shape[name] for name in names},
        max_position_embeddings=256,
        rope_parameters={"rope_type": "default", "rope_theta": shape["rope_theta"]},
        pad_token_id=shape["pad"],
        bos_token_id=shape["bos"],
        eos_token_id=shape["eos"],
        tie_word_embeddings=False,
        attn_implementation=attention,
    )
    made: Any = LlamaForCausalLM(config)
    base = {name.removeprefix("base."): tensor for name, tensor in weights.items() if name.startswith("base.")}
    made.load_state_dict(base)
    tokens = MemoryTokens(made.get_input_embeddings(), slots)
    tokens.table.data = weights["comp_embeddings"][:slots].clone()
    if lora:
        targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
        made = get_peft_model(
            made, LoraConfig(r=shape["lora_r"], lora_alpha=shape["lora_alpha"], target_modules=targets)
        )
        for name, parameter in adapters(made).items():
            parameter.data = weights[f"lora.{name}"].clone()
    return made.eval(), tokens


def adapters(model: Any) -> dict[str, torch.nn.Parameter]:
    """LoRA matrices by the names of the reference."""
    found = {}
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            found[name.removeprefix("base_model.model.model.").removesuffix(".default.weight")] = parameter
    return found
