"""Tiny random models of several families with memory tokens, and random contexts in chunks."""

import random
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from kvc.methods.ccm.parallel import Compressor
from kvc.methods.ccm.tokens import MemoryTokens

SHAPE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **SHAPE, "num_key_value_heads": 4},
    "llama-gqa": {"model_type": "llama", **SHAPE},
    "mistral": {"model_type": "mistral", **SHAPE, "sliding_window": None},
    "qwen2": {"model_type": "qwen2", **SHAPE},
    "qwen3": {"model_type": "qwen3", **SHAPE},
}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]


def plain(family: str = "llama-gqa", attention: str = "sdpa", **overrides: Any) -> Any:
    """A random base model in eval mode, the same every time."""
    fields = {**FAMILIES[family], **overrides}
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval().requires_grad_(False)


def adapted(model: Any, dropout: float = 0.0, targets: list[str] | None = None, **kwargs: Any) -> Any:
    """The same model with LoRA whose B is not zero."""
    config = LoraConfig(r=4, lora_alpha=8, lora_dropout=dropout, target_modules=targets or TARGETS, **kwargs)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        wrapped = get_peft_model(model, config)
        for name, parameter in wrapped.named_parameters():
            if ".lora_B." in name:
                torch.nn.init.normal_(parameter, std=0.2)
    return wrapped.eval()


def compressor(family: str = "llama-gqa", slots: int = 2, attention: str = "sdpa", **kwargs: Any) -> Compressor:
    """A compressor with random, visible memory tokens."""
    model = adapted(plain(family, attention))
    tokens = MemoryTokens(model.get_input_embeddings(), slots)
    generator = torch.Generator().manual_seed(2)
    tokens.table.data = torch.randn(tokens.table.shape, generator=generator) * 0.3
    return Compressor(model, tokens, **kwargs)


@dataclass
class Context:
    """One row: a prompt that stays, chunks to compress, and what follows."""

    prompt: list[int]
    chunks: list[list[int]]
    tail: list[int]


def contexts(counts: list[int], seed: int = 0, prompt: int = 2) -> list[Context]:
    """Rows with the given numbers of chunks, of random lengths."""
    draw = random.Random(seed)

    def text(low: int, high: int) -> list[int]:
        return [draw.randint(3, 63) for _ in range(draw.randint(low, high))]

    return [
        Context(text(prompt, prompt + row if prompt else 0), [text(1, 6) for _ in range(count)], text(3, 6))
        for row, count in enumerate(counts)
    ]


def padded(rows: list[list[int]], left: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask."""
    width = max(map(len, rows))
    gaps = [[0] * (width - len(row)) for row in rows]
    ids = [gap + row if left else row + gap for row, gap in zip(rows, gaps)]
    mask = [
        [0] * len(gap) + [1] * len(row) if left else [1] * len(row) + [0] * len(gap) for row, gap in zip(rows, gaps)
    ]
    return torch.tensor(ids), torch.tensor(mask)


def sequences(rows: list[Context], slots: int, left: bool = True) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Whole sequences for the parallel form: ids, mask and kept tokens."""
    run = list(range(64, 64 + slots))
    whole = [row.prompt + [t for chunk in row.chunks for t in chunk + run] + row.tail for row in rows]
    ids, mask = padded(whole, left)
    kept, _ = padded(
        [[1] * len(row.prompt) + [0] * (len(line) - len(row.prompt)) for row, line in zip(rows, whole)], left
    )
    return ids, mask, kept.bool()


def tails(logits: torch.Tensor, mask: torch.Tensor, rows: list[Context]) -> list[torch.Tensor]:
    """Logits of each row's tail."""
    return [line[real.bool()][-len(row.tail) :] for line, real, row in zip(logits, mask, rows)]
