"""Gates of variable-length summaries: soft, random, and as logarithms in attention."""

from typing import Any

import pytest
import torch
from autocompressor_tiny import variable

from kvc.errors import UserError
from kvc.methods.autocompressor.compressor import Reading
from kvc.methods.autocompressor.draws import stop_loss
from kvc.methods.autocompressor.settings import parts_of
from kvc.methods.autocompressor.softprompt import SoftPrompt
from kvc.methods.autocompressor.stopping import draw_stops, log_gates
from kvc.methods.autocompressor.summary import Report


def test_gates_are_products_of_survival() -> None:
    p = torch.tensor([[0.1, 0.5, 0.9]])
    logit = torch.logit(p)
    torch.testing.assert_close(log_gates(logit, "after").exp(), torch.tensor([[0.9, 0.45, 0.045]]))
    torch.testing.assert_close(log_gates(logit, "before").exp(), torch.tensor([[1.0, 0.9, 0.45]]))
    certain = log_gates(torch.tensor([[100.0]]), "log")
    assert torch.isfinite(certain).all()


@torch.no_grad()
@pytest.mark.parametrize("gate", ["after", "before", "log"])
def test_stops_are_drawn_as_often_as_expected(gate: Any) -> None:
    torch.manual_seed(0)
    logit = torch.tensor([0.1, 0.5, 0.3]).logit()
    kept, chance = draw_stops(logit.expand(20_000, -1), gate)
    torch.testing.assert_close(kept.float().mean(0), log_gates(logit[None], gate).exp()[0], atol=0.02, rtol=0)
    assert bool((kept[:, 1:] <= kept[:, :-1]).all())
    # The probability of a draw is how often it was drawn.
    lengths = kept.sum(-1)
    for length in lengths.unique():
        (of_one,) = chance[lengths == length].unique().exp()
        torch.testing.assert_close((lengths == length).float().mean(), of_one, atol=0.02, rtol=0)


@pytest.mark.parametrize("gate", ["after", "before", "log"])
def test_drawn_stops_leave_vectors_out_in_training_alone(gate: Any) -> None:
    ids = torch.randint(3, 64, (200, 9), generator=torch.Generator().manual_seed(5))
    compressor = variable(gate=gate)
    compressor.summary.draws_stops = True

    def read() -> Reading:
        torch.manual_seed(0)
        return compressor.read(ids, output_softprompt=True, soft=True)

    soft = read()
    assert soft.prompt.mask is None
    compressor.summary.train()
    drawn = read()
    (before,), (after,) = soft.reports, drawn.reports
    assert before.chance is None
    torch.testing.assert_close(after.gate, before.gate)
    kept = drawn.prompt.mask
    assert kept is not None
    torch.testing.assert_close(kept.float().mean(0), before.gate.mean(0), atol=0.12, rtol=0)
    # What follows reads what it would read after hard stops at the same places.
    row = int((kept.sum(-1) == 2).nonzero()[0])
    hard = SoftPrompt(after.z[row : row + 1, :2])
    ours = compressor.read(ids[:1], softprompt=row_of(drawn.prompt, row)).hidden
    torch.testing.assert_close(ours, compressor.read(ids[:1], softprompt=hard).hidden, rtol=1e-4, atol=1e-5)


def test_drawn_stops_give_the_gradient_of_the_expected_loss() -> None:
    # Two steps that end with 0, 1 or 2 vectors, each with probability 1/3: all pairs of draws are the expectation.
    cost = torch.tensor([2.0, 0.5, 0.3])
    logit = torch.tensor([1 / 3, 1 / 2]).logit().requires_grad_()
    survived = torch.nn.functional.logsigmoid(-logit).cumsum(0)
    chances = torch.stack(
        [torch.nn.functional.logsigmoid(logit[0]), survived[0] + torch.nn.functional.logsigmoid(logit[1]), survived[1]]
    )
    (expected,) = torch.autograd.grad((chances.exp() * cost).sum(), logit, retain_graph=True)
    made = torch.cartesian_prod(torch.arange(3), torch.arange(3)).flatten()
    # Columns 0-2 are the first segment, whose loss a stop after it does not change, and neither that of its successor.
    losses, scored = torch.zeros(18, 5), torch.ones(18, 5, dtype=torch.bool)
    losses[:, :3] = torch.arange(18.0)[:, None]
    losses[:, 3], losses[:, 4] = cost[made] / 4, cost[made] * 3 / 4
    scored[:, 1] = False
    reading = Reading(
        torch.zeros(18, 6, 1), SoftPrompt.empty(torch.zeros(18, 1, 1)), [3, 3], None, [drew(chances[made])]
    )
    total = stop_loss(reading, losses[scored], scored, copies=2)
    torch.testing.assert_close(torch.autograd.grad(total / len(made), logit)[0], expected)


def drew(chance: torch.Tensor) -> Report:
    nothing = torch.zeros(len(chance))
    return Report(nothing, nothing, nothing, nothing, nothing, nothing, nothing.bool(), nothing, chance)


def row_of(prompt: SoftPrompt, row: int) -> SoftPrompt:
    part = slice(row, row + 1)
    gate = None if prompt.log_gate is None else prompt.log_gate[part]
    return SoftPrompt(prompt.vectors[part], None if prompt.mask is None else prompt.mask[part], gate)


def test_a_log_gate_of_one_is_none_and_of_zero_is_no_vector() -> None:
    compressor = variable("opt")
    ids, vectors = (
        torch.randint(3, 64, (2, 6), generator=torch.Generator().manual_seed(0)),
        torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0)),
    )

    def read(prompt: SoftPrompt) -> torch.Tensor:
        return compressor.read(ids, softprompt=prompt).hidden

    torch.testing.assert_close(read(SoftPrompt(vectors, None, torch.zeros(2, 3))), read(SoftPrompt(vectors)))
    closed = torch.tensor([[0.0, -1e9, 0.0]]).expand(2, -1)
    torch.testing.assert_close(read(SoftPrompt(vectors, None, closed)), read(SoftPrompt(vectors[:, [0, 2]])))
    half = torch.tensor([[0.0, -1.0, 0.0]]).expand(2, -1)
    assert not torch.allclose(read(SoftPrompt(vectors, None, half)), read(SoftPrompt(vectors)))


def test_steps_of_the_loop_may_have_embeddings() -> None:
    ids = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(5))
    plain = variable().read(ids, output_softprompt=True, soft=True)
    compressor = variable(step_width=32)
    steps = compressor.summary.steps
    assert steps.shape == (4, 32)
    torch.testing.assert_close(compressor.read(ids, output_softprompt=True, soft=True).reports[0].z, plain.reports[0].z)
    steps.data[2] += 1.0
    with torch.enable_grad():
        reading = compressor.read(ids, output_softprompt=True, soft=True)
        reading.reports[0].z.sum().backward()
    same = [torch.equal(reading.reports[0].z[:, step], plain.reports[0].z[:, step]) for step in range(4)]
    assert same == [True, True, False, False]
    assert bool(steps.grad.any(1).all())
    with pytest.raises(UserError, match="step_embeddings: the layout of the published AutoCompressors"):
        parts_of(compressor)
