import io
import math
from typing import Any

import pytest
import torch
from torch import nn

from kvc.core.optim import MuonAdamW, Optim


def rates(optim: Optim, total: int) -> list[float]:
    factor = optim.multiplier(total)
    return [factor(step) for step in range(total + 1)]


def test_cosine_with_warmup_steps_and_floor() -> None:
    values = rates(Optim(warmup=4, schedule="cosine", floor=0.1), 20)
    assert values[:4] == [0.25, 0.5, 0.75, 1.0]
    assert values[4] == 1.0
    assert values[12] == pytest.approx(0.1 + 0.9 * 0.5)
    assert values[8] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert values[20] == pytest.approx(0.1)


def test_linear_falls_over_the_last_fraction_only() -> None:
    values = rates(Optim(schedule="linear", decay=0.5, floor=0.2), 20)
    assert values[:11] == [1.0] * 11
    assert values[15] == pytest.approx(0.6)
    assert values[20] == pytest.approx(0.2)


def test_linear_over_the_whole_run_begins_after_the_warmup() -> None:
    values = rates(Optim(schedule="linear", warmup=0.2), 20)
    assert values[:4] == [0.25, 0.5, 0.75, 1.0]
    assert values[12] == pytest.approx(0.5)
    assert values[20] == 0.0


def test_constant_stays() -> None:
    assert rates(Optim(schedule="constant", warmup=2), 5) == [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]


def parameters() -> dict[str, list[nn.Parameter]]:
    torch.manual_seed(0)
    return {
        "model": [nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(4))],
        "head": [nn.Parameter(torch.randn(3, 4))],
    }


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_groups_have_their_own_rates_and_vectors_do_not_decay(kind: Any) -> None:
    optim = Optim(lr=0.1, lrs={"head": 0.02}, weight_decay=0.3, kind=kind, warmup=2, schedule="constant")
    optimizer, schedule = optim.build(parameters(), 10)
    groups = {group["name"]: group for group in optimizer.param_groups}
    assert {name: group["weight_decay"] for name, group in groups.items()} == {
        "model": 0.3,
        "model/vectors": 0.0,
        "head": 0.3,
    }
    assert {name: group["lr"] for name, group in groups.items()} == {"model": 0.05, "model/vectors": 0.05, "head": 0.01}
    optimizer.step()
    schedule.step()
    assert {name: group["lr"] for name, group in groups.items()} == {"model": 0.1, "model/vectors": 0.1, "head": 0.02}


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_decay_moves_matrices_alone(kind: Any) -> None:
    groups = parameters()
    before = [p.detach().clone() for p in groups["model"]]
    optimizer, _ = Optim(lr=0.1, weight_decay=0.5, kind=kind, schedule="constant").build(groups, 10)
    for parameter in [*groups["model"], *groups["head"]]:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    matrix, vector = groups["model"]
    assert torch.allclose(matrix, before[0] * 0.95, atol=1e-6)
    assert torch.equal(vector, before[1])


def test_muon_is_for_matrices_that_are_no_embedding_and_no_head() -> None:
    optimizer, _ = Optim(kind="muon").build(parameters(), 10)
    assert isinstance(optimizer, MuonAdamW)
    kinds = {g["name"]: type(inner).__name__ for inner in optimizer.inner for g in inner.param_groups}
    assert kinds == {"model": "Muon", "model/vectors": "AdamW", "head": "AdamW"}


def train(optimizer: Any, schedule: Any, groups: dict[str, list[nn.Parameter]], steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for parameter in [*groups["model"], *groups["head"]]:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_saved_optimiser_goes_on_with_the_same_bits(kind: Any) -> None:
    optim = Optim(lr=0.1, lrs={"head": 0.02}, weight_decay=0.1, kind=kind, warmup=2)
    groups = parameters()
    optimizer, schedule = optim.build(groups, 12)
    train(optimizer, schedule, groups, range(5))
    buffer = io.BytesIO()
    torch.save([optimizer.state_dict(), schedule.state_dict()], buffer)
    buffer.seek(0)
    saved, saved_schedule = torch.load(buffer, weights_only=True)
    copies = {name: [nn.Parameter(p.detach().clone()) for p in part] for name, part in groups.items()}
    train(optimizer, schedule, groups, range(5, 12))

    fresh, fresh_schedule = optim.build(copies, 12)
    fresh.load_state_dict(saved)
    fresh_schedule.load_state_dict(saved_schedule)
    train(fresh, fresh_schedule, copies, range(5, 12))
    for name, part in groups.items():
        assert all(torch.equal(a, b) for a, b in zip(part, copies[name])), name
    assert str(fresh.state_dict()) == str(optimizer.state_dict())


def test_unknown_group_is_refused_with_the_names_that_exist() -> None:
    with pytest.raises(ValueError, match=r"no group 'lora'; this method has head, model"):
        Optim(lrs={"lora": 0.1}).build(parameters(), 10)


@pytest.mark.parametrize(
    ("field", "value"), [("lr", -1.0), ("lrs", {"head": -1.0}), ("decay", 0.0), ("decay", 1.5), ("warmup", -1.0)]
)
def test_values_out_of_range_are_refused(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=r"optim\."):
        Optim(**{field: value})
