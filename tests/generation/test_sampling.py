"""Draws follow the filtered distribution, and depend on nothing but seed, row and step."""

import math
import random

import pytest
import torch
from torch import Tensor

from kvc.errors import UserError
from kvc.generation import sampling
from kvc.generation.sampling import Forced, Greedy, Sampler, Sampling

V = 37


def logits(rows: int, steps: int = 1) -> Tensor:
    return torch.randn(steps, rows, V, generator=torch.Generator().manual_seed(3)) * 2


def draws(sampler: Sampler, steps: Tensor, alive: list[list[int]] | None = None) -> list[list[int]]:
    """Tokens that each row got from logits `[S, B, V]`; `alive` are the live rows of every step."""
    everyone = list(range(steps.shape[1]))
    sampler.reset(len(everyone))
    got: list[list[int]] = [[] for _ in everyone]
    for step, logits_BV in enumerate(steps):
        rows = alive[step] if alive else everyone
        for row, token in zip(rows, sampler(logits_BV[rows], rows).tolist(), strict=True):
            got[row].append(token)
    return got


def test_greedy_takes_the_most_likely() -> None:
    logits_BV = logits(4)[0]
    assert Greedy()(logits_BV, range(4)).tolist() == logits_BV.argmax(-1).tolist()


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 1.0, "top_p": 1.0},
        {"temperature": 0.6, "top_p": 0.9},
        {"temperature": 1.5, "top_p": 1.0, "top_k": 5},
        {"temperature": 1.0, "top_p": 0.95, "top_k": 20, "min_p": 0.1},
    ],
    ids=str,
)
def test_frequencies_are_those_of_generate(settings: dict) -> None:
    """Of a thousand rows with the same logits, over 40 steps."""
    rows, steps = 1000, 40
    logits_V = logits(1)[0, 0]
    got = torch.tensor(draws(Sampling(**settings), logits_V.expand(steps, rows, V))).flatten().bincount(minlength=V)
    expected = reference(logits_V, **settings)
    assert not got[expected == 0].any()
    error = (got / got.sum() - expected).abs() / (expected * (1 - expected) / got.sum()).sqrt().clamp(min=1e-9)
    assert error[expected > 0].max() < 4.5 or (expected > 0).sum() == 1


def reference(logits: Tensor, temperature: float, top_p: float, top_k: int = 0, min_p: float = 0.0) -> Tensor:
    """Probabilities after the filters, written out token by token."""
    probability = (logits.double() / temperature).softmax(0)
    if top_k:
        probability[probability < probability.topk(top_k).values[-1]] = 0
        probability /= probability.sum()
    order, mass = probability.argsort(descending=True).tolist(), 0.0
    for token in order:
        if mass >= top_p:
            probability[token] = 0
        mass += float(probability[token])
    probability /= probability.sum()
    probability[probability < min_p * probability.max()] = 0
    return probability / probability.sum()


def test_a_row_does_not_see_the_others() -> None:
    """The same row alone, in a batch, in a larger batch, and with others leaving: over the border of a block."""
    steps = sampling.BLOCK + 40
    logits_SBV = logits(5, steps)
    everyone = draws(Sampling(), logits_SBV)
    assert draws(Sampling(), logits_SBV[:, :3]) == everyone[:3]
    assert draws(Sampling(seed=1), logits_SBV) != everyone
    draw = random.Random(0)
    last = [steps, 100, 256, 257, 0]
    alive = [[row for row in range(5) if step < last[row]] for step in range(steps)]
    assert draws(Sampling(), logits_SBV, alive) == [row[:end] for row, end in zip(everyone, last, strict=True)]
    shuffled = [draw.sample(rows, len(rows)) for rows in alive]
    assert draws(Sampling(), logits_SBV, shuffled) == [row[:end] for row, end in zip(everyone, last, strict=True)]


def test_a_row_that_waits_goes_on_with_its_own_step() -> None:
    logits_BV = logits(2)[0]
    same = logits_BV.expand(sampling.BLOCK + 50, 2, V)
    alone = draws(Sampling(), same)
    alive = [[0, 1] if step % 3 == 0 else [1] for step in range(len(same))]
    waiting = draws(Sampling(), same, alive)
    assert waiting[1] == alone[1]
    assert waiting[0] == alone[0][: len(waiting[0])]


def test_rows_steps_and_blocks_draw_different_numbers() -> None:
    sampler = Sampling(top_p=1.0, temperature=1.0)
    flat = torch.zeros(2 * sampling.BLOCK, 3, 10_000)
    got = torch.tensor(draws(sampler, flat)).flatten().tolist()
    expected = 10_000 * (1 - math.exp(-len(got) / 10_000))
    assert abs(len(set(got)) - expected) < 5 * math.sqrt(len(got))
    again = draws(sampler, flat[:300])
    assert torch.tensor(again).flatten().tolist() == [t for row in torch.tensor(got).view(3, -1)[:, :300] for t in row]


def test_a_seed_for_each_row_draws_what_the_row_alone_draws() -> None:
    together, flat = Sampling(seed=[7, 9, 7]), torch.zeros(3, 500)
    together.reset(3)
    drawn = torch.stack([together(flat, [0, 1, 2]) for _ in range(20)], dim=1)
    for row, seed in enumerate([7, 9, 7]):
        alone = Sampling(seed=seed)
        alone.reset(1)
        assert drawn[row].tolist() == [int(alone(flat[:1], [0])) for _ in range(20)]
    assert drawn[0].tolist() != drawn[1].tolist()
    with pytest.raises(UserError, match="seed: one for each row is needed, got 3 for 2 rows"):
        together.reset(2)


def test_what_the_global_generator_does_changes_nothing() -> None:
    logits_SBV = logits(2, 20)
    first = draws(Sampling(), logits_SBV)
    state = torch.get_rng_state()
    assert draws(Sampling(), logits_SBV) == first
    assert torch.equal(torch.get_rng_state(), state)


def test_the_ends_of_the_unit_interval_give_tokens_that_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    logits_BV = torch.full((1, V), -math.inf)
    logits_BV[0, 5:9] = torch.tensor([1.0, 2.0, 0.5, 1.1])
    for uniform, token in ((0.0, 5), (math.nextafter(1, 0), 8), (1.0, 8)):
        sampler = Sampling(temperature=1.0, top_p=1.0)
        sampler.reset(1)
        monkeypatch.setattr(sampler, "_draw", lambda rows, u=uniform: torch.tensor([u], dtype=torch.float64))
        assert sampler(logits_BV, [0]).tolist() == [token]


def test_rare_tokens_behind_a_likely_one_keep_their_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of a billionth just below one are lost in float32."""
    rare, tokens = 1e-9, torch.arange(1, 1000, 37)
    row = torch.full((1000,), math.log(rare))
    row[0] = 0.0
    sampler = Sampling(temperature=1.0, top_p=1.0)
    point = (1 + (tokens.double() - 0.5) * rare) / (1 + 999 * rare)
    monkeypatch.setattr(sampler, "_draw", lambda rows: point)
    assert torch.equal(sampler(row.expand(len(tokens), -1), range(len(tokens))), tokens)


def test_narrow_logits_are_widened_and_left_alone() -> None:
    logits_SBV = logits(3, 30).bfloat16()
    before = logits_SBV.clone()
    assert draws(Sampling(), logits_SBV) == draws(Sampling(), logits_SBV.float())
    assert torch.equal(logits_SBV, before)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_no_numbers_are_an_error(bad: float) -> None:
    logits_BV = logits(2)[0]
    logits_BV[1, 3] = bad
    sampler = Sampling()
    sampler.reset(2)
    with pytest.raises(UserError, match="logits"):
        sampler(logits_BV, [0, 1])


@pytest.mark.parametrize(
    "settings",
    [
        *({"temperature": t} for t in (0, -1.0, math.nan, math.inf)),
        *({"top_p": p} for p in (0, 1.1, -0.1)),
        {"top_k": -1},
        *({"min_p": p} for p in (-0.1, 1.1)),
    ],
    ids=str,
)
def test_bad_settings_name_their_key(settings: dict) -> None:
    with pytest.raises(UserError, match=next(iter(settings))):
        Sampling(**settings)


def test_no_temperature_points_to_greedy() -> None:
    with pytest.raises(UserError, match="use Greedy"):
        Sampling(temperature=0)


def test_forced_feeds_its_tokens_and_their_likelihoods() -> None:
    sequences = [[3, 1, 4, 1], [5, 9], [2, 6, 5]]
    logits_SBV = logits(3, 5)
    forced = Forced(sequences, fill=0)
    assert draws(forced, logits_SBV) == [[3, 1, 4, 1, 0], [5, 9, 0, 0, 0], [2, 6, 5, 0, 0]]
    alive = [[2, 0, 1], [1, 2, 0], [0, 2], [0]]
    exact = Forced(sequences)
    assert draws(exact, logits_SBV[:4], alive) == sequences
    for sampler in (forced, exact):
        for row, sequence in enumerate(sequences):
            expected = logits_SBV[range(len(sequence)), row].log_softmax(-1)[range(len(sequence)), sequence]
            torch.testing.assert_close(sampler.log_likelihoods[row], expected)
    exact.reset(3)
    assert [len(row) for row in exact.log_likelihoods] == [0, 0, 0]


def test_forced_says_what_does_not_fit() -> None:
    with pytest.raises(UserError, match="row 1 has no tokens"):
        Forced([[1], []])
    forced = Forced([[1], [2, 3]])
    with pytest.raises(UserError, match="2 for 3 rows"):
        forced.reset(3)
    with pytest.raises(UserError, match="row 0 is longer"):
        draws(forced, logits(2, 2))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("deterministic", [False, True])
def test_a_gpu_draws_what_the_cpu_draws(deterministic: bool) -> None:
    logits_SBV = logits(4, 200)
    expected = draws(Sampling(), logits_SBV)
    torch.use_deterministic_algorithms(deterministic)
    try:
        assert draws(Sampling(), logits_SBV.cuda()) == expected
    finally:
        torch.use_deterministic_algorithms(False)
