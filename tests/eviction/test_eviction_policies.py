"""What holds for every policy: window, prefix, budget, padding, order."""

import itertools
import random

import pytest
import torch
import views

from kvc.errors import UserError
from kvc.eviction.policy import Policy
from kvc.eviction.registry import POLICIES, make_policy

EVICTING = sorted(set(POLICIES) - {"none"})
ORDERED = sorted(set(EVICTING) - {"streaming_llm", "tova"})


def small(name: str, **settings: object) -> Policy:
    """A policy whose window fits into small budgets."""
    if name == "snapkv_prefill":
        settings = {"window": 8, **settings}
    return make_policy(name, **settings)


def kept_positions(view: views.View, indices: torch.Tensor) -> torch.Tensor:
    found = view.positions.gather(-1, indices.clamp_min(0))
    return found.masked_fill(indices < 0, -1)


@pytest.mark.parametrize("name", EVICTING)
@pytest.mark.parametrize("seed", range(6))
def test_budget_window_prefix_and_order_of_time(name: str, seed: int) -> None:
    draw = random.Random(seed)
    prefix = draw.choice([0, 0, 3, 5])
    policy = small(name)
    budget = policy.window + prefix + draw.randint(5, 20)
    length = budget + draw.randint(1, 60)
    shape = {"kv_heads": draw.choice([1, 2, 3]), "group": draw.choice([1, 2]), "width": draw.choice([4, 8])}
    view = views.view([length] * draw.choice([1, 3]), seed, **shape)
    indices = policy.select(view, budget, prefix=prefix)
    assert indices.dtype == torch.int64
    assert indices.shape == (*view.keys.shape[:2], budget)
    assert (indices.diff(dim=-1) > 0).all(), "order of time, nothing twice"
    assert torch.equal(indices[..., :prefix], torch.arange(prefix).expand(*indices.shape[:2], prefix))
    newest = torch.arange(length - policy.window, length)
    assert torch.equal(indices[..., -policy.window :], newest.expand(*indices.shape[:2], -1))


@pytest.mark.parametrize("name", ORDERED)
def test_order_of_score_keeps_the_same_rows_best_first(name: str) -> None:
    view = views.view([60, 60], seed=3)
    by_score, by_time = small(name, order="score"), small(name)
    first, second = by_score.select(view, 24, prefix=4), by_time.select(view, 24, prefix=4)
    assert torch.equal(first.sort(-1).values, second)
    assert torch.equal(first[..., :4], second[..., :4]), "the prefix comes first"
    past = 60 - by_score.recent(24, 4)
    scores = by_score.score(view, past, 0).gather(-1, first[..., 4 : 24 - by_score.recent(24, 4)])
    assert (scores.diff(dim=-1) <= 0).all()
    assert not torch.equal(first, second)


@pytest.mark.parametrize("name", sorted(POLICIES))
@pytest.mark.parametrize("budget", [40, 41, 100])
def test_a_budget_of_the_length_keeps_all(name: str, budget: int) -> None:
    view = views.view([40, 40])
    indices = small(name).select(view, budget)
    assert torch.equal(indices, torch.arange(40).expand(2, 2, 40))


def test_none_keeps_all_below_the_length_too() -> None:
    view = views.view([30, 12])
    kept = kept_positions(view, make_policy("none").select(view, 5))
    assert torch.equal(kept, view.positions)


@pytest.mark.parametrize("name", sorted(POLICIES))
@pytest.mark.parametrize("order", ["time", "score"])
@pytest.mark.parametrize("lengths", [[50, 33, 50, 20, 9], [20, 21, 20], [4, 7, 60]])
def test_a_padded_row_gets_the_indices_of_the_row_alone(name: str, order: str, lengths: list[int]) -> None:
    policy = small(name, order=order) if name in ORDERED else small(name)
    batch = views.view(lengths, seed=7)
    for prefix in (0, 3):
        together = kept_positions(batch, policy.select(batch, 20, prefix=prefix))
        for number in range(len(lengths)):
            alone = views.row(batch, number)
            expected = kept_positions(alone, policy.select(alone, 20, prefix=prefix))
            width = expected.shape[-1]
            assert torch.equal(together[number, :, together.shape[-1] - width :], expected[0])
            assert (together[number, :, : together.shape[-1] - width] == -1).all(), "empty slots stand at the left"


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_heads_of_unequal_lengths(name: str) -> None:
    policy = small(name)
    batch = views.view([[50, 31], [31, 31], [12, 40]], seed=5)
    indices = policy.select(batch, 20)
    kept = kept_positions(batch, indices)
    for row, head in itertools.product(range(3), range(2)):
        count = int((batch.positions[row, head] >= 0).sum())
        stays = kept[row, head][indices[row, head] >= 0]
        assert len(stays) == (count if name == "none" else min(count, 20))
        assert len(stays.unique()) == len(stays)
        assert stays[-1] == count - 1
        assert (indices[row, head] >= 0).int().diff().min() >= 0, "empty slots stand at the left"
    alone = views.row(batch, 1)
    expected = kept_positions(alone, policy.select(alone, 20))[0]
    assert torch.equal(kept[1][..., -expected.shape[-1] :], expected)


def test_padding_would_be_seen() -> None:
    """The check above can fail: scoring with empty slots gives other rows."""
    batch = views.view([50, 33], seed=7)
    policy = make_policy("rkv")
    naive = policy._choose(batch, 20, 0, 0)[1]
    assert not torch.equal(naive, policy.select(batch, 20)[1])


@pytest.mark.parametrize("name", EVICTING)
def test_a_budget_that_is_too_small(name: str) -> None:
    view = views.view([60])
    policy = small(name)
    limit = max(policy.window + 6, getattr(policy, "sinks", 0))
    with pytest.raises(UserError, match="budget"):
        policy.select(view, limit, prefix=6)
    policy.select(view, limit + 1, prefix=6)


@pytest.mark.parametrize("name", EVICTING)
def test_missing_queries_or_attention(name: str) -> None:
    policy = small(name)
    view = views.view([60])._replace(queries=None, attention=None)
    if policy.needs_queries:
        with pytest.raises(UserError, match="queries"):
            policy.select(view, 20)
    elif policy.needs_attention:
        with pytest.raises(UserError, match="attention"):
            policy.select(view, 20)
    else:
        assert policy.select(view, 20).shape[-1] == 20


@pytest.mark.parametrize(
    ("name", "settings", "match"),
    [
        ("rvk", {}, "none named 'rvk'"),
        ("rkv", {"lambda": 0.1}, "mix_lambda"),
        ("rkv", {"mix_lambda": 1.5}, "mix_lambda"),
        ("rkv", {"kernel_size": 4}, "kernel_size"),
        ("rkv", {"retain_direction": "best"}, "retain_direction"),
        ("rkv", {"projection": 0}, "projection"),
        ("rkv", {"retain_ratio": 2}, "retain_ratio"),
        ("rkv", {"order": "size"}, "order"),
        ("knorm", {"window": 0}, "window"),
        ("h2o", {"recent_ratio": 1.0}, "recent_ratio"),
        ("streaming_llm", {"sinks": -1}, "sinks"),
    ],
)
def test_bad_settings(name: str, settings: dict[str, object], match: str) -> None:
    with pytest.raises(UserError, match=match):
        make_policy(name, **settings)
    with pytest.raises(UserError, match="prefix"):
        make_policy("rkv").select(views.view([60]), 20, prefix=-1)
