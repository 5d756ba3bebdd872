"""Anchors: rows of the model's own cache, at their own places."""

from typing import Any

import pytest
import torch

from kvc.core.backbone import Backbone, Lora
from kvc.methods.squad import FixedRatio, FixedSlots
from kvc.methods.squad.anchor import Anchors

HEAD = torch.tensor([[1, 20, 21], [1, 22, 0]])
HEAD_MASK = torch.tensor([[1, 1, 1], [1, 1, 0]])
TEXT = torch.arange(30, 50).view(2, 10)
TEXT_MASK = torch.arange(10) < torch.tensor([10, 6])[:, None]
TAIL = torch.tensor([[60, 61], [62, 63]])


def model(folder: Any, **settings: Any) -> Any:
    return Backbone(pretrained=str(folder), **settings).load().eval()


def anchors(bidirectional: bool = True) -> Anchors:
    made = Anchors(32, bidirectional=bidirectional)
    made.mark.data = torch.randn(32, generator=torch.Generator().manual_seed(0))
    return made


def read(base: Any, memory: Any, ids: torch.Tensor) -> torch.Tensor:
    return base(ids, **memory.forward_kwargs(ids)).logits


@torch.no_grad()
def test_keeping_everything_is_the_plain_model(tiny_folder: Any) -> None:
    base = model(tiny_folder)
    memory = Anchors(32, bidirectional=False)(base, HEAD, HEAD_MASK, TEXT, TEXT_MASK, FixedRatio(1))
    assert memory.next_position.tolist() == [13, 8]
    logits = read(base, memory, TAIL)
    for row, (head, text) in enumerate(((3, 10), (2, 6))):
        whole = torch.cat([HEAD[row, :head], TEXT[row, :text], TAIL[row]])[None]
        torch.testing.assert_close(logits[row], base(whole).logits[0, -2:], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_anchors_are_the_middles_of_segments(tiny_folder: Any) -> None:
    base, made = model(tiny_folder), anchors()
    memory = made(base, HEAD, HEAD_MASK, TEXT, TEXT_MASK, FixedRatio(4))
    for layer in memory.layers:
        places = layer.positions.reshape(2, -1, layer.positions.shape[-1])[:, 0]
        found = [sorted(place for place in row.tolist() if place >= 0) for row in places]
        # 3 anchors of 10 tokens after a head of 3, 2 of 6 after a head of 2.
        assert found == [[0, 1, 2, 3 + 1, 3 + 5, 3 + 8], [0, 1, 2 + 1, 2 + 4]]
    assert memory.next_position.tolist() == [13, 8]
    few = made(base, HEAD, HEAD_MASK, TEXT, TEXT_MASK, FixedSlots(8))
    assert float(few.tokens[0]) == 3 + 8
    # No token is kept twice.
    assert float(few.tokens[1]) == 2 + 6


@pytest.mark.parametrize("bidirectional", [True, False])
@torch.no_grad()
def test_a_row_in_a_batch_of_anchors_is_the_row_alone(tiny_folder: Any, bidirectional: bool) -> None:
    base, made = model(tiny_folder), anchors(bidirectional)
    logits = read(base, made(base, HEAD, HEAD_MASK, TEXT, TEXT_MASK, FixedRatio(4)), TAIL)
    for row, (head, text) in enumerate(((3, 10), (2, 6))):
        ids = HEAD[row : row + 1, :head], torch.ones(1, head), TEXT[row : row + 1, :text], torch.ones(1, text)
        alone = made(base, *ids, FixedRatio(4))
        torch.testing.assert_close(logits[row : row + 1], read(base, alone, TAIL[row : row + 1]), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_an_anchor_reads_what_follows_it_only_both_ways(tiny_folder: Any) -> None:
    base = model(tiny_folder)
    changed = TEXT.clone()
    changed[0, 9] = 99
    for bidirectional in (True, False):
        made = anchors(bidirectional)
        first, second = (
            read(base, made(base, HEAD, HEAD_MASK, text, TEXT_MASK, FixedSlots(2)), TAIL) for text in (TEXT, changed)
        )
        assert torch.allclose(first[0], second[0], atol=1e-5) != bidirectional


@torch.no_grad()
def test_generate_goes_on_after_the_text(tiny_folder: Any) -> None:
    base, made = model(tiny_folder), anchors()
    memory = made(base, HEAD, HEAD_MASK, TEXT, TEXT_MASK, FixedRatio(4))
    fork = memory.fork()
    said = base.generate(
        TAIL, **fork.generate_kwargs(TAIL), max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0
    )[:, 2:]
    logits = read(base, memory, torch.cat([TAIL, said[:, :-1]], dim=1))
    assert torch.equal(logits[:, 1:].argmax(-1), said)


def test_the_mark_and_the_adapters_are_trained(tiny_folder: Any) -> None:
    wrapped = model(tiny_folder, lora=Lora(r=2, dropout=0.0))
    for name, parameter in wrapped.named_parameters():
        if ".lora_B" in name:
            parameter.data.normal_(std=0.1)
    made = anchors()
    assert sum(p.numel() for p in made.parameters()) == 32
    memory = made(wrapped, HEAD, HEAD_MASK, TEXT, TEXT_MASK, FixedRatio(4))
    with wrapped.disable_adapter():
        loss = read(wrapped, memory, TAIL).log_softmax(-1)[..., 70].sum()
    # Inside, the adapters would be frozen for the backward, too.
    loss.backward()
    assert made.mark.grad is not None
    assert made.mark.grad.abs().max() > 1e-6
    keys = [p.grad for name, p in wrapped.named_parameters() if ".lora_A" in name and ".k_proj" in name]
    assert keys
    assert all(grad is not None and grad.any() for grad in keys)
