"""Tiny random models of several families, and what a memory should do said a second time, slowly."""

import copy
from functools import cache
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

SHAPE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **SHAPE},
    "one-layer": {"model_type": "llama", **SHAPE, "num_hidden_layers": 1},
    "llama3-rope": {
        "model_type": "llama",
        **SHAPE,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "yarn": {
        "model_type": "llama",
        **SHAPE,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "dynamic": {
        "model_type": "llama",
        **SHAPE,
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
    },
    "qwen2": {"model_type": "qwen2", **SHAPE},
    "mistral": {"model_type": "mistral", **SHAPE, "sliding_window": 5},
    "gemma3": {
        "model_type": "gemma3_text",
        **SHAPE,
        "initializer_range": 0.1,
        "head_dim": 8,
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "cohere": {"model_type": "cohere", **SHAPE},
    "phi": {"model_type": "phi", **SHAPE},
    "phi3": {"model_type": "phi3", **SHAPE},
    "opt": {
        "model_type": "opt",
        "vocab_size": 64,
        "hidden_size": 32,
        "word_embed_proj_dim": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
        "init_std": 0.2,
    },
}


@cache
def tiny(family: str, attention: str = "sdpa", seed: int = 0) -> PreTrainedModel:
    """A random model in eval mode, the same every time."""
    fields = dict(FAMILIES[family])
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    """Random ids without the special ones."""
    return torch.randint(3, 64, shape, generator=torch.Generator().manual_seed(seed))


def left_padded(rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """One batch of rows `[T_i]` of different lengths, and its mask."""
    width = max(len(row) for row in rows)
    ids = torch.stack([torch.cat([row.new_zeros(width - len(row)), row]) for row in rows])
    mask = torch.stack([torch.arange(width) >= width - len(row) for row in rows]).long()
    return ids, mask


@torch.no_grad()
def masked_logits(
    model: PreTrainedModel,
    ids: torch.Tensor,
    prompt: int,
    kept: list[torch.Tensor],
    window: list[int | None] | None = None,
) -> torch.Tensor:
    """Logits of a full forward in which tokens from `prompt` on see only kept prompt tokens, by layer and head.

    Args:
        model: Any family.
        ids: `[1, T]`.
        prompt: Number of tokens that see everything before them.
        kept: For each layer, bool `[KV heads, prompt]`.
        window: For each layer, how far a token looks back.
    """
    model = copy.deepcopy(model)
    model.set_attn_implementation("eager")
    size = ids.shape[1]
    causal = torch.ones(size, size, dtype=torch.bool).tril()
    back = torch.arange(size)[:, None] - torch.arange(size)[None]
    modules = [m for m in model.modules() if type(m).__name__.endswith("Attention")]
    assert len(modules) == len(kept)

    def masker(layer: int) -> Any:
        groups = model.config.num_attention_heads // len(kept[layer])
        visible = causal.expand(len(kept[layer]), size, size).clone()
        visible[:, prompt:, :prompt] &= kept[layer][:, None]
        if window is not None and window[layer] is not None:
            visible &= back < window[layer]
        visible = visible.repeat_interleave(groups, dim=0)[None]
        mask = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)

        def hook(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
            return args, {**kwargs, "attention_mask": mask}

        return hook

    for layer, module in enumerate(modules):
        module.register_forward_pre_hook(masker(layer), with_kwargs=True)
    return model(ids, use_cache=False, position_ids=torch.arange(size)[None]).logits


def indices_of(kept: torch.Tensor) -> torch.Tensor:
    """bool `[H, N]` to slots `[1, H, K]`, shorter heads filled up with -1 on the left."""
    rows = [row.nonzero().flatten() for row in kept]
    width = max(len(row) for row in rows)
    return torch.stack([torch.cat([row.new_full((width - len(row),), -1), row]) for row in rows])[None]
