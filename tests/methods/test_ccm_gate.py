"""A conditional LoRA is a LoRA for the chosen tokens and nothing for the others, also while layers are recomputed."""

import copy
from pathlib import Path
from typing import Any

import ccm_tiny as tiny
import pytest
import torch
from peft import PeftModel

from kvc.errors import UserError
from kvc.methods.ccm.gate import gate_lora

IDS = torch.arange(3, 27).view(2, 12)
CHOSEN = torch.tensor([4, 5, 11, 12, 20])


def gated(**kwargs: Any) -> Any:
    model = tiny.adapted(tiny.plain(), **kwargs)
    gate_lora(model)
    return model


def masked(model: Any, index: torch.Tensor) -> Any:
    """The same, said slowly: the whole product, then zeros."""
    keep = torch.zeros(IDS.numel(), 1).index_fill_(0, index, 1.0).view(*IDS.shape, 1)
    for name, module in model.named_modules():
        if name.endswith("lora_B.default"):
            module.register_forward_hook(lambda module, args, output: output * keep)
    return model


@torch.no_grad()
def test_chosen_tokens_get_the_adapter_and_no_others() -> None:
    expected = masked(tiny.adapted(tiny.plain()), CHOSEN)(IDS).logits
    torch.testing.assert_close(gated()(IDS, kvc_gate=CHOSEN).logits, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_ordinary_tokens_get_the_base_model_bit_for_bit() -> None:
    base, model = tiny.plain()(IDS).logits, gated()
    assert torch.equal(model(IDS).logits, base)
    found = model(IDS, kvc_gate=CHOSEN).logits
    first = [4, 0]
    for row, before in enumerate(first):
        assert torch.equal(found[row, :before], base[row, :before])
    assert not torch.allclose(found[0, 4], base[0, 4], atol=1e-3)
    assert torch.equal(model(IDS).logits, base), "a choice outlived its forward"


@torch.no_grad()
def test_choosing_all_is_an_ordinary_lora() -> None:
    expected = tiny.adapted(tiny.plain())(IDS).logits
    torch.testing.assert_close(gated()(IDS, kvc_gate=torch.arange(24)).logits, expected, atol=1e-6, rtol=1e-5)


def gradients(model: Any, order: str) -> dict[str, torch.Tensor]:
    """Two forwards with different choices, then the backward of both, or one after the other."""
    model.zero_grad()
    choices = [CHOSEN, torch.tensor([0, 1, 2])]
    losses = [lambda c=c: model(IDS, kvc_gate=c, use_cache=False).logits.logsumexp(-1).sum() for c in choices]
    if order == "together":
        sum(loss() for loss in losses).backward()
    else:
        for loss in losses:
            loss().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_recomputed_layers_see_the_choice_of_their_own_forward() -> None:
    expected = gradients(gated().train(), "one by one")
    assert expected
    model = gated()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    assert all(layer.gradient_checkpointing for layer in model.get_base_model().model.layers)
    for order in ("together", "one by one"):
        found = gradients(model, order)
        assert found.keys() == expected.keys()
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, expected[name], atol=1e-4, rtol=1e-4)


def test_a_batch_without_chosen_tokens_trains() -> None:
    model = gated(dropout=0.1).train()
    model(IDS, kvc_gate=CHOSEN[:0]).logits.sum().backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(g is not None and not g.any() for g in grads)


@torch.no_grad()
def test_dropout_acts_on_the_adapter() -> None:
    model = gated(dropout=0.5)
    evaluated = model(IDS, kvc_gate=CHOSEN).logits
    assert torch.equal(model(IDS, kvc_gate=CHOSEN).logits, evaluated)
    trained = model.train()(IDS, kvc_gate=CHOSEN).logits
    assert not torch.allclose(trained, evaluated)
    assert torch.equal(trained[0, :4], evaluated[0, :4])


@torch.no_grad()
def test_a_copy_has_gates_of_its_own() -> None:
    model = gated()
    expected = model(IDS, kvc_gate=CHOSEN).logits
    other = copy.deepcopy(model)
    model(IDS[:1], kvc_gate=CHOSEN[:1])
    assert torch.equal(other(IDS, kvc_gate=CHOSEN).logits, expected)
    gate_lora(other)
    assert torch.equal(other(IDS, kvc_gate=CHOSEN).logits, expected), "gated twice"


@torch.no_grad()
def test_adapters_leave_and_come_as_a_peft_folder(tmp_path: Path) -> None:
    model = gated()
    model.save_pretrained(tmp_path)
    read: Any = PeftModel.from_pretrained(tiny.plain(), tmp_path).eval()
    assert torch.equal(read(IDS).logits, tiny.adapted(tiny.plain())(IDS).logits)
    gate_lora(read)
    assert torch.equal(read(IDS, kvc_gate=CHOSEN).logits, model(IDS, kvc_gate=CHOSEN).logits)


def test_what_cannot_be_gated_is_refused() -> None:
    with pytest.raises(UserError, match="cond_lora: there is no LoRA"):
        gate_lora(tiny.plain())
    with pytest.raises(UserError, match=r"backbone.lora: .* without DoRA"):
        gate_lora(tiny.adapted(tiny.plain(), use_dora=True))
    with pytest.raises(UserError, match=r"backbone.lora.targets: .* LM head"):
        gate_lora(tiny.adapted(tiny.plain(), targets=["q_proj", "lm_head"]))
    with pytest.raises(UserError, match=r"backbone.lora.targets: .* embed_tokens does not"):
        gate_lora(tiny.adapted(tiny.plain(), targets=["q_proj", "embed_tokens"]))


@torch.no_grad()
def test_other_layers_than_attention_may_have_adapters() -> None:
    targets = ["q_proj", "down_proj"]
    expected = masked(tiny.adapted(tiny.plain(), targets=targets), CHOSEN)(IDS).logits
    found = gated(targets=targets)(IDS, kvc_gate=CHOSEN).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
