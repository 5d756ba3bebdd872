"""Tiny random models of several families, and compressors on them."""

from typing import Any

import torch
from ccm_tiny import FAMILIES, SHAPE, adapted, padded
from transformers import AutoConfig, AutoModelForCausalLM

from kvc.methods.autocompressor.compressor import Compressor, Reading
from kvc.methods.autocompressor.controls import OwnControls
from kvc.methods.autocompressor.fixed import FixedSummary
from kvc.methods.autocompressor.stopping import Gate, Stopping
from kvc.methods.autocompressor.variable import VariableSummary

__all__ = ["ALL", "SCALED", "adapted", "base", "fixed", "kernel", "padded", "perturbed", "prompts_equal", "variable"]

OPT: dict[str, Any] = {
    "model_type": "opt",
    "vocab_size": SHAPE["vocab_size"],
    "hidden_size": 32,
    "word_embed_proj_dim": 32,
    "ffn_dim": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "init_std": 0.2,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "pad_token_id": 1,
    "bos_token_id": 2,
    "eos_token_id": 2,
}
SCALED: dict[str, dict[str, Any]] = {
    "gemma2": {"model_type": "gemma2", **SHAPE, "final_logit_softcapping": 0.5, "sliding_window": 256},
    "cohere": {"model_type": "cohere", **SHAPE, "logit_scale": 0.25},
    "granite": {"model_type": "granite", **SHAPE, "logits_scaling": 8.0, "embedding_multiplier": 3.0},
}
"""Families whose logits are not those of the LM head alone."""
ALL = {
    **FAMILIES,
    **SCALED,
    "opt": OPT,
    "opt-350m": {**OPT, "word_embed_proj_dim": 16, "do_layer_norm_before": False},
}


BIAS = {"opt": -3.9, "opt-350m": -2.0, "gemma2": 0.7, "cohere": 0.7}
"""So that rows stop at different steps."""


def kernel(family: str) -> str:
    """What its attention can run on."""
    return "eager" if family == "gemma2" else "sdpa"


def base(family: str = "llama-gqa", attention: str | None = None, **overrides: Any) -> Any:
    """A random causal LM in eval mode, the same every time."""
    attention = attention or kernel(family)
    fields = {**ALL[family], **overrides}
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


def fixed(family: str = "llama-gqa", length: int = 3, accumulate: bool = True, **kwargs: Any) -> Compressor:
    """Fixed length, with summary tokens that differ."""
    model = kwargs.pop("model", None) or base(family)
    summary = FixedSummary(model, length, accumulate)
    perturbed(summary, 0.3)
    return Compressor(model, summary, **kwargs)


def variable(
    family: str = "llama-gqa", gate: Gate = "after", stop: Stopping | None = None, **kwargs: Any
) -> Compressor:
    """Variable length, with stopping probabilities that are neither 0 nor 1."""
    model = kwargs.pop("model", None) or base(family)
    settings = {
        name: kwargs.pop(name)
        for name in ("insertion", "compression_lambda", "temperature", "step_width")
        if name in kwargs
    }
    controls = kwargs.pop("controls", None) or OwnControls(model, stop_bias=BIAS.get(family, -0.5))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in controls.named_parameters():
            if not name.endswith("bias"):
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    summary = VariableSummary(controls, 4, gate=gate, stopping=stop or Stopping("threshold", 0.4), **settings)
    return Compressor(model, summary.eval(), **kwargs)


def perturbed(module: torch.nn.Module, scale: float) -> None:
    """Add noise to all weights, the same every time."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator)


def prompts_equal(one: Reading, row: int, other: Reading) -> None:
    """The soft prompt of one row is that of another reading."""
    mine = one.prompt.vectors[row][one.prompt.valid[row]]
    theirs = other.prompt.vectors[0][other.prompt.valid[0]]
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=2e-5)
