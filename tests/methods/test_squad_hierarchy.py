"""Compressors one after the other, and budgets drawn for each text."""

from functools import partial
from typing import Any

import pytest
import torch

from kvc.errors import UserError
from kvc.methods.squad import Convolution, CrossAttention, FixedRatio, FixedSlots, Latent, MeanPool
from kvc.methods.squad.budget import GivenSlots
from kvc.methods.squad.hierarchy import Hierarchical
from kvc.methods.squad.sampled import Sampled

D = 32
STACKS: dict[str, Any] = {
    "default": {"last": partial(Latent, slots=16)},
    "conv, cross": {
        "stages": [partial(Convolution, slots=64, max_length=128)],
        "ratios": [2.0],
        "last": partial(CrossAttention, slots=16),
    },
    "three": {"stages": [MeanPool, MeanPool], "ratios": [2.0, 3.0], "last": MeanPool},
}


def made(name: str) -> Hierarchical:
    torch.manual_seed(0)
    compressor = Hierarchical(D, 0.5, **STACKS[name]).eval()
    for parameter in compressor.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return compressor


def states(*lengths: int) -> tuple[torch.Tensor, torch.Tensor]:
    values = torch.randn(len(lengths), max(lengths), D, generator=torch.Generator().manual_seed(1))
    return values, torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


@pytest.mark.parametrize("name", STACKS)
@pytest.mark.parametrize("budget", [FixedSlots(7), FixedRatio(8), FixedRatio(2.5)])
@torch.no_grad()
def test_slots_are_those_of_the_budget_and_padding_changes_nothing(name: str, budget: Any) -> None:
    lengths = (1, 5, 38, 17) if isinstance(budget, FixedRatio) and budget.ratio < 3 else (1, 5, 90, 64)
    values, mask = states(*lengths)
    found = made(name)(values, mask, budget)
    assert found.mask.sum(1).tolist() == budget.counts(torch.tensor(lengths)).tolist()
    assert found.slots.isfinite().all()
    for row, length in enumerate(lengths):
        alone = made(name)(values[row : row + 1, :length], mask[row : row + 1, :length], budget)
        torch.testing.assert_close(found.slots[row][found.mask[row]], alone.slots[0][alone.mask[0]])


@torch.no_grad()
def test_means_of_means_are_means() -> None:
    plain = partial(MeanPool, project=False, norm=False)
    stack = Hierarchical(D, 1.0, stages=[plain], ratios=[4.0], last=plain)
    values, mask = states(32, 64)
    once = plain(D, 1.0)(values, mask, FixedRatio(16))
    torch.testing.assert_close(stack(values, mask, FixedRatio(16)).slots, once.slots)


def test_every_stage_is_trained() -> None:
    compressor = made("conv, cross").train()
    values, mask = states(30, 12)
    compressor(values, mask, FixedRatio(8)).slots.square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in compressor.stages.parameters())


def test_the_last_stage_reads_fewer_states() -> None:
    seen = []

    class Watch(MeanPool):
        def compress(self, states: Any, mask: Any, plan: Any) -> Any:
            seen.append(states.shape[1])
            return super().compress(states, mask, plan)

    Hierarchical(D, 1.0, [Watch], [4.0], Watch)(*states(64), FixedSlots(3))
    assert seen == [64, 16]


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(UserError, match=r"compressor\.ratios: 2 of them for 1 stages"):
        Hierarchical(D, 1.0, [MeanPool], [4.0, 2.0])
    with pytest.raises(UserError, match="asks for 9 slots, more than the 8"):
        Hierarchical(D, 1.0, last=partial(Latent, slots=8))(*states(40), FixedSlots(9))
    with pytest.raises(UserError, match="there is none to draw from"):
        Sampled([])
    for weights in ([1.0], [1.0, -1.0], [0.0, 0.0]):
        with pytest.raises(UserError, match=r"budget\.weights must be 2 numbers"):
            Sampled([FixedRatio(2), FixedRatio(4)], weights)


def test_budgets_are_drawn_for_each_text() -> None:
    budgets = [FixedRatio(4), FixedSlots(3), FixedSlots(40)]
    lengths = torch.arange(400) % 50
    torch.manual_seed(5)
    sampled = Sampled(budgets, [1.0, 1.0, 2.0])
    counts = sampled.counts(lengths)
    each = torch.stack([budget.counts(lengths) for budget in budgets])
    assert (each == counts).any(0).all()
    assert (counts == 40).float().mean() == pytest.approx(0.49, abs=0.06)
    assert (counts == 3).float().mean() == pytest.approx(0.26, abs=0.06)
    assert not torch.equal(counts, sampled.counts(lengths))
    torch.manual_seed(5)
    assert torch.equal(counts, sampled.counts(lengths))
    assert sampled.width(counts) == 40
    assert Sampled([FixedSlots(2), FixedSlots(9)], [0.0, 1.0]).counts(torch.tensor([5, 0])).tolist() == [9, 0]


@torch.no_grad()
def test_a_text_gives_what_its_drawn_budget_gives_alone() -> None:
    compressor = CrossAttention(D, 1.0, slots=16).eval()
    values, mask = states(20, 33, 9, 40)
    torch.manual_seed(2)
    sampled = Sampled([FixedSlots(2), FixedSlots(5), FixedSlots(16)])
    found = compressor(values, mask, sampled)
    counts = found.mask.sum(1).tolist()
    assert len(set(counts)) > 1
    for row, count in enumerate(counts):
        alone = compressor(values[row : row + 1], mask[row : row + 1], FixedSlots(count))
        torch.testing.assert_close(found.slots[row, :count], alone.slots[0])


def test_given_numbers() -> None:
    given = GivenSlots(torch.tensor([3, 1, 2]))
    counts = given.counts(torch.tensor([9, 9, 0]))
    assert counts.tolist() == [3, 1, 0]
    assert given.width(counts) == 3
