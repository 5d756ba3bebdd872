"""Logits of hidden states are those of the model's own forward, whatever its family does after the LM head."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from kvc.core.backbone import decoder, head_logits

SHAPE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
OTHER: dict[str, dict[str, Any]] = {
    "gemma2": {"head_dim": 8, "final_logit_softcapping": 1.0},
    "granite": {"logits_scaling": 8.0},
    "mixtral": {"num_local_experts": 2},
    "gpt2": {"n_embd": 32, "n_layer": 1, "n_head": 4},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32, "init_std": 0.2},
}
SCALED = {"gemma2", "cohere", "granite"}


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere", "granite", "mixtral", "gpt2", "opt", "gpt_neox"])
@torch.no_grad()
def test_logits_are_those_of_the_model(family: str) -> None:
    config = AutoConfig.for_model(family, **{**SHAPE, **OTHER.get(family, {})})
    base = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    ids = torch.arange(3, 17).view(2, 7)
    expected, hidden = base(ids).logits, decoder(base)(ids).last_hidden_state
    assert torch.equal(head_logits(base, hidden), expected)
    assert torch.equal(head_logits(base, hidden[1, 2:5]), expected[1, 2:5])
    assert head_logits(base, hidden[:0, 0]).shape == (0, 64)
    assert torch.equal(base(ids).logits, expected), "the model was changed"
    assert torch.allclose(base.get_output_embeddings()(hidden), expected) != (family in SCALED)
    wrapped = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear"))
    assert torch.equal(head_logits(wrapped, hidden), expected)


def test_gradients_reach_hidden_states_and_head() -> None:
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SHAPE))
    hidden = torch.randn(3, 32, requires_grad=True)
    head_logits(base, hidden).square().sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.any()
    assert base.lm_head.weight.grad.any()
    assert {name for name, p in base.named_parameters() if p.grad is not None} == {"lm_head.weight"}
