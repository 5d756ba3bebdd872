"""What each policy means by a good row."""

import pytest
import torch
import views

from kvc.eviction.policy import View
from kvc.eviction.registry import make_policy


def flat(length: int = 40, kv_heads: int = 2) -> View:
    """A memory in which every row is as good as any other."""
    keys = torch.ones(1, kv_heads, length, 8)
    return View(
        keys,
        keys.clone(),
        torch.arange(length).expand(1, kv_heads, -1),
        keys[:, :, -8:].repeat(1, 2, 1, 1),
        keys[..., 0],
    )


def kept(name: str, view: View, budget: int, **settings: object) -> list[set[int]]:
    return [set(head.tolist()) for head in make_policy(name, **settings).select(view, budget)[0]]


def test_knorm_keeps_small_keys() -> None:
    view = flat()
    view.keys[0, 0, [3, 17]] *= 0.1
    view.keys[0, 1, [4, 5]] *= 0.1
    first, second = kept("knorm", view, 10)
    assert {3, 17} <= first
    assert {4, 5} <= second


def test_keydiff_keeps_keys_unlike_the_others() -> None:
    view = flat()
    view.keys[0, 0, [3, 17]] *= -1
    assert {3, 17} <= kept("keydiff", view, 10)[0]


@pytest.mark.parametrize("name", ["snapkv", "snapkv_prefill", "rkv"])
def test_attended_keys_and_their_neighbours_stay(name: str) -> None:
    view = flat()
    view.keys[0, :, 20] *= 3
    assert set(range(18, 23)) <= kept(name, view, 15, window=8, kernel_size=5)[0]


def test_one_query_head_of_a_group_suffices_for_snapkv() -> None:
    view = flat()
    view.queries[0, :] = 0.0
    view.queries[0, 1] = 1.0
    view.keys[0, :, 20] *= 3
    first, second = kept("snapkv", view, 10, kernel_size=1)
    assert 20 in first
    assert second == {*range(32, 40), *list(second - set(range(32, 40)))}


def test_tova_keeps_the_same_tokens_in_all_heads_by_the_newest_query() -> None:
    view = views.view([40], seed=2)
    first, second = kept("tova", view, 12)
    assert first == second
    other = view._replace(queries=view.queries.clone())
    other.queries[:, :, :-1] = 0.0
    assert kept("tova", other, 12)[0] == first, "older queries do not count"


def test_h2o_keeps_heavy_hitters_beside_recent_rows() -> None:
    view = flat()
    view.attention[0, 0, [2, 9, 11]] += 5
    assert kept("h2o", view, 19, recent_ratio=0.85)[0] == {2, 9, 11, *range(24, 40)}


def test_h2o_average_does_not_favour_age() -> None:
    view = flat()
    view.attention[0, :] = torch.arange(40, 0, -1)  # every query gives every key it sees the same
    view.attention[0, 0, 30] += 1
    assert 30 not in kept("h2o", view, 10, recent_ratio=0)[0]
    assert 30 in kept("h2o", view, 10, recent_ratio=0, average=True)[0]


def test_streaming_keeps_sinks_by_position_whatever_the_storage() -> None:
    view = flat()
    shuffled = view._replace(positions=view.positions.clone())
    shuffled.positions[0, :, :10] = torch.arange(9, -1, -1)
    assert kept("streaming_llm", shuffled, 12)[0] == {9, 8, 7, 6, *range(32, 40)}


def test_rkv_drops_copies_where_attention_is_equal() -> None:
    """Of keys with equal attention those that repeat go, their newest copy excepted."""
    keys = torch.eye(40)[None, None]
    keys[0, 0, 5:20] = keys[0, 0, 4]
    view = View(keys, keys, torch.arange(40).expand(1, 1, -1), torch.zeros(1, 1, 8, 40))
    assert kept("rkv", view, 25)[0] == {*range(4), *range(19, 40)}


def test_random_is_a_uniform_sample_that_nothing_but_the_seed_moves() -> None:
    view = flat(length=2000, kv_heads=4)
    policy = make_policy("random")
    one = policy.select(view, 508, layer=0)
    assert torch.equal(one, policy.select(view, 508, layer=0))
    assert not torch.equal(one, policy.select(view, 508, layer=1))
    assert not torch.equal(one[0, 0], one[0, 1])
    assert not torch.equal(one, make_policy("random", seed=7).select(view, 508))
    sampled = one[..., :-8].double()
    assert abs(float(sampled.mean()) - 1992 / 2) < 60, "no age is preferred"
    scores = policy.score(view, 1992, 0)
    assert scores.min() >= 0
    assert scores.max() < 1
    assert abs(float(scores.var()) - 1 / 12) < 0.005


def test_random_in_two_steps_equals_one() -> None:
    view = flat(length=400)
    policy = make_policy("random")
    once = policy.select(view, 50)
    first = policy.select(View(*(t[:, :, :300] for t in view)), 80)
    rest = torch.arange(300, 400).expand(1, 2, -1)
    memory = torch.cat([first, rest], -1)
    twice = policy.select(View(*(view.keys[:, :, :180],) * 2, view.positions.gather(-1, memory)), 50)
    window = set(range(292, 300))
    for a, b in zip(once[0], memory.gather(-1, twice)[0], strict=True):
        assert len(set(a.tolist()) - window ^ set(b.tolist()) - window) <= 2 * len(window)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("order", ["time", "score"])
def test_rkv_in_half_precision(dtype: torch.dtype, order: str) -> None:
    view = views.view([200], seed=4, width=16)
    half = View(*(t.to(dtype) if t.is_floating_point() else t for t in view))
    full = make_policy("rkv", order=order).select(view, 64)[0]
    found = make_policy("rkv", order=order).select(half, 64)[0]
    for a, b in zip(full, found, strict=True):
        assert len(set(a.tolist()) & set(b.tolist())) >= 0.9 * 64
