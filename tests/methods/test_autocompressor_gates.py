"""Gates of variable-length summaries: soft, random, and as logarithms in attention."""

from typing import Any

import pytest
import torch
from autocompressor_tiny import variable

from kvc.errors import UserError
from kvc.methods.autocompressor.compressor import Reading
from kvc.methods.autocompressor.settings import parts_of
from kvc.methods.autocompressor.softprompt import SoftPrompt
from kvc.methods.autocompressor.stopping import log_gates, random_gates


def test_gates_are_products_of_survival() -> None:
    p = torch.tensor([[0.1, 0.5, 0.9]])
    logit = torch.logit(p)
    torch.testing.assert_close(log_gates(logit, "after").exp(), torch.tensor([[0.9, 0.45, 0.045]]))
    torch.testing.assert_close(log_gates(logit, "before").exp(), torch.tensor([[1.0, 0.9, 0.45]]))
    certain = log_gates(torch.tensor([[100.0]]), "log")
    assert torch.isfinite(certain).all()


@torch.no_grad()
@pytest.mark.parametrize("gate", ["after", "before", "log"])
def test_random_gates_are_hard_and_as_often_open_as_expected(gate: Any) -> None:
    torch.manual_seed(0)
    logit = torch.tensor([0.1, 0.5, 0.3]).logit().expand(20_000, -1).clone().requires_grad_()
    with torch.enable_grad():
        log_gate, kept = random_gates(logit, gate, 0.5)
        (log_gate * kept).sum().backward()
    assert not log_gate.any()
    torch.testing.assert_close(kept.float().mean(0), log_gates(logit[:1], gate).exp()[0], atol=0.02, rtol=0)
    assert bool((kept[:, 1:] <= kept[:, :-1]).all())
    # A gate grows as the logits of the stops before it fall.
    assert bool((logit.grad <= 0).all())
    assert bool(logit.grad[:, 0].any())


@pytest.mark.parametrize("gate", ["after", "before", "log"])
def test_random_stops_leave_vectors_out_in_training_alone(gate: Any) -> None:
    ids = torch.randint(3, 64, (200, 9), generator=torch.Generator().manual_seed(5))
    compressor = variable(gate=gate, temperature=0.5)

    def read() -> Reading:
        torch.manual_seed(0)
        return compressor.read(ids, output_softprompt=True, soft=True)

    soft = read()
    assert soft.prompt.mask is None
    compressor.summary.train()
    drawn = read()
    (before,), (after,) = soft.reports, drawn.reports
    torch.testing.assert_close(after.gate, before.gate)
    kept = drawn.prompt.mask
    assert kept is not None
    torch.testing.assert_close(kept.float().mean(0), before.gate.mean(0), atol=0.12, rtol=0)
    torch.testing.assert_close(drawn.prompt.vectors, after.z * kept[..., None])
    # What follows reads what it would read after hard stops at the same places.
    row = int((kept.sum(-1) == 2).nonzero()[0])
    hard = SoftPrompt(after.z[row : row + 1, :2])
    ours = compressor.read(ids[:1], softprompt=row_of(drawn.prompt, row)).hidden
    torch.testing.assert_close(ours, compressor.read(ids[:1], softprompt=hard).hidden, rtol=1e-4, atol=1e-5)


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
