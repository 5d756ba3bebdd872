"""Compressors: how many parameters and slots, what padding does, what they are before training."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

from kvc.errors import UserError
from kvc.methods.squad import (
    Convolution,
    CrossAttention,
    FixedRatio,
    FixedSlots,
    Latent,
    MeanPool,
    SlotCompressor,
    WeightedPooling,
)
from kvc.methods.squad.bins import Bins, even_bins, windows
from kvc.methods.squad.chunks import join, split
from kvc.methods.squad.interface import Plan
from kvc.methods.squad.scale import embedding_rms, relative_rms

D = 32
MAKERS: dict[str, Callable[..., SlotCompressor]] = {
    "cross_attention": CrossAttention,
    "cross_attention_tokens": lambda *a, **k: CrossAttention(*a, **k, query_init="tokens", iterations=2),
    "conv": Convolution,
    "conv_strided": lambda *a, **k: Convolution(*a, **k, stride_mode="strided"),
    "pooling": WeightedPooling,
    "pooling_content": lambda *a, **k: WeightedPooling(*a, **k, content_scores=True),
    "latent": Latent,
    "mean_pool": lambda width, rms, slots=64: MeanPool(width, rms),
}
every = pytest.mark.parametrize("name", MAKERS)


def made(name: str, slots: int = 16, rms: float = 1.0) -> SlotCompressor:
    torch.manual_seed(0)
    compressor = MAKERS[name](D, rms, slots=slots).eval()
    for parameter in compressor.parameters():  # what is 0 or 1 at the start would hide mistakes
        parameter.data += 0.1 * torch.randn_like(parameter)
    return compressor


def row(length: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(1, length, D, generator=torch.Generator().manual_seed(seed))


def plan(lengths: list[int], counts: list[int], window: float | None = None) -> Plan:
    total = max(counts)
    mask = torch.arange(total) < torch.tensor(counts)[:, None]
    return Plan(torch.tensor(lengths), torch.tensor(counts), mask, window)


def count(kind: Any, **settings: Any) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in kind(4096, 0.0084, **settings).parameters())


@pytest.mark.parametrize(
    ("kind", "counts"),
    [
        (CrossAttention, (100_843_520, 100_974_592, 101_236_736)),
        (Convolution, (33_705_984, 33_640_448, 33_607_680)),
        (WeightedPooling, (16_790_016, 16_790_016, 16_790_016)),
        (Latent, (134_524_928, 134_787_072, 135_311_360)),
    ],
)
def test_parameters_at_the_size_of_llama_8b(kind: Any, counts: tuple[int, int, int]) -> None:
    assert tuple(count(kind, slots=slots) for slots in (32, 64, 128)) == counts


@pytest.mark.parametrize("slots", [8, 64])
def test_parameters_by_formula(slots: int) -> None:
    d, step = 64, 512 // slots

    def ours(compressor: SlotCompressor) -> int:
        return sum(p.numel() for p in compressor.parameters())

    assert ours(CrossAttention(d, 1.0, slots)) == slots * d + (4 * d * d + 4 * d) + 3 * 2 * d + 2 * (d * d + d)
    assert ours(CrossAttention(d, 1.0, slots, iterations=6)) == ours(CrossAttention(d, 1.0, slots))
    assert ours(Convolution(d, 1.0, slots)) == (d * 2 * step + d) + (2 * d * d + 2 * d) + 2 * d
    assert ours(WeightedPooling(d, 1.0, slots)) == slots * step + d * d + d + 2 * d
    assert ours(WeightedPooling(d, 1.0, slots, content_scores=True)) == slots * step + d * d + 4 * d
    assert ours(Latent(d, 1.0, slots)) == 2 * slots * d + 2 * (4 * d * d // 2) + 4 * 2 * d + (4 * d * d + 3 * d)
    assert [ours(MeanPool(d, 1.0, *flags)) for flags in ((True, True), (True, False), (False, False))] == [
        d * d + 2 * d,
        d * d,
        0,
    ]


@every
@torch.no_grad()
def test_exactly_m_slots_for_every_length(name: str) -> None:
    compressor = made(name, slots=64)
    states = row(512).expand(512, -1, -1)
    mask = torch.arange(512) < torch.arange(1, 513)[:, None]
    for part in range(0, 512, 128):
        chosen = slice(part, part + 128)
        slots, valid, _ = compressor(states[chosen], mask[chosen], FixedSlots(64))
        assert slots.shape == (128, 64, D)
        assert valid.all()
        assert slots.isfinite().all()
        # Each slot says something: the norm of nothing would be a constant.
        assert (slots.std(-1) > 0.1).all()


@every
@pytest.mark.parametrize("budget", [FixedSlots(16), FixedSlots(5), FixedRatio(4), FixedRatio(2.5)], ids=str)
@torch.no_grad()
def test_padding_and_other_rows_change_nothing(name: str, budget: Any) -> None:
    compressor = made(name, slots=16)
    compressor.with_weights = True
    lengths = [1, 3, 17, 40]
    # Padding may hold anything.
    states = torch.full((4, 45, D), torch.nan)
    for index, length in enumerate(lengths):
        states[index, :length] = row(length, index)
    together = compressor(states, torch.arange(45) < torch.tensor(lengths)[:, None], budget)
    for index, length in enumerate(lengths):
        alone = compressor(row(length, index), torch.ones(1, length), budget)
        size = alone.slots.shape[1]
        assert together.mask[index].sum() == alone.mask.sum()
        torch.testing.assert_close(together.slots[index, :size], alone.slots[0], atol=1e-5, rtol=1e-5)
        assert not together.slots[index, size:].any()
        for key, value in alone.aux.items():
            found = together.aux[key][index, :size]
            torch.testing.assert_close(found[..., :length], value[0], atol=1e-5, rtol=1e-5)
            assert not found[together.mask[index, :size]][..., length:].any()


@every
@torch.no_grad()
def test_a_slot_reads_the_order_of_the_text(name: str) -> None:
    compressor = made(name)
    compressor.with_weights = True
    text, mask = row(24), torch.ones(1, 24)
    first = compressor(text, mask, FixedSlots(2))
    turned = compressor(text.flip(1), mask, FixedSlots(2))
    assert not torch.allclose(first.slots, turned.slots, atol=1e-3)
    if "weights" in first.aux:
        torch.testing.assert_close(first.aux["weights"].sum(-1), torch.ones(1, 2))


@every
@torch.no_grad()
def test_a_row_without_tokens_has_no_slots(name: str) -> None:
    compressor = made(name)
    states, mask = row(6).expand(2, -1, -1), torch.tensor([[1] * 6, [0] * 6])
    for budget in (FixedSlots(4), FixedRatio(2)):
        slots, valid, _ = compressor(states, mask, budget)
        assert valid.sum(-1).tolist() == [int(budget.counts(torch.tensor([6]))), 0]
        assert slots.isfinite().all()
        assert not slots[1].any()


@every
def test_every_parameter_gets_a_finite_gradient(name: str) -> None:
    compressor = made(name, slots=4).train()
    compressor.requires_grad_(True)
    mask = torch.arange(20) < torch.tensor([20, 7, 0])[:, None]
    slots = compressor(row(20).expand(3, -1, -1), mask, FixedRatio(5)).slots
    (slots * torch.randn(slots.shape, generator=torch.Generator().manual_seed(3))).sum().backward()
    for key, parameter in compressor.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
        # A softmax does not see what is added to all keys.
        assert parameter.grad.abs().max() > 1e-9 or key.endswith("k.bias"), key


@every
@torch.no_grad()
def test_the_output_is_as_large_as_the_embeddings(name: str) -> None:
    rms = 0.0084
    torch.manual_seed(0)
    compressor = MAKERS[name](D, rms, slots=8).eval()
    for scale in (rms, 1.0, 50.0):  # embeddings of a large model, states of a small one, states of a large one
        slots, mask, _ = compressor(scale * row(60), torch.ones(1, 60), FixedSlots(8))
        assert float(relative_rms(slots, mask, rms)) == pytest.approx(1, rel=0.05), scale


@pytest.mark.parametrize("mode", ["dense", "strided"])
@torch.no_grad()
def test_the_gate_of_the_convolution_reads_small_states_as_it_does_large_ones(mode: Any) -> None:
    torch.manual_seed(0)
    compressor = Convolution(D, 1.0, slots=8, stride_mode=mode).eval()
    small, large = (compressor(scale * row(60), torch.ones(1, 60), FixedSlots(8)).slots for scale in (0.0084, 1.0))
    torch.testing.assert_close(small, large, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("mode", ["dense", "strided"])
@torch.no_grad()
def test_an_untrained_convolution_is_close_to_mean_pooling(mode: Any) -> None:
    torch.manual_seed(0)
    made, text = Convolution(D, 1.0, slots=128, stride_mode=mode).eval(), row(40)
    slots = made(text, torch.ones(1, 40), FixedRatio(4)).slots
    means = MeanPool(D, 1.0, project=False)(text, torch.ones(1, 40), FixedRatio(4)).slots
    assert torch.cosine_similarity(slots, means, dim=-1).mean() > (0.8 if mode == "dense" else 0.3)


@torch.no_grad()
def test_relative_rms_counts_real_slots_only() -> None:
    slots = torch.full((1, 3, 4), 6.0)
    assert float(relative_rms(slots, torch.tensor([[True, True, False]]), 2.0)) == pytest.approx(3)


def test_embedding_rms() -> None:
    table = torch.nn.Embedding(3, 2)
    table.weight.data = torch.tensor([[3.0, 0.0], [0.0, 0.0], [0.0, 3.0]])
    assert embedding_rms(table) == pytest.approx(math.sqrt(18 / 6))
    scaled = Gemma3TextScaledWordEmbedding(3, 2, 0, embed_scale=5.0)
    scaled.weight.data = table.weight.data
    assert embedding_rms(scaled) == pytest.approx(5 * math.sqrt(18 / 6))


@pytest.mark.parametrize("length", [1, 2, 3, 5, 16, 17, 63, 64, 65, 150, 511, 512])
@pytest.mark.parametrize("slots", [1, 4, 17, 64, 128])
def test_bins_are_those_of_adaptive_pooling(length: int, slots: int) -> None:
    text = row(length)
    bins = even_bins(torch.tensor([length]), plan([length], [slots]))
    expected = F.adaptive_avg_pool1d(text.transpose(1, 2), slots).transpose(1, 2)
    torch.testing.assert_close(bins.mean(text), expected, atol=1e-5, rtol=1e-5)
    member = bins.member(length)
    assert member.any(-1).all()
    assert member.any(1).all()


@pytest.mark.parametrize("length", [1, 5, 8, 40, 150])
@torch.no_grad()
def test_untrained_pooling_is_mean_pooling(length: int) -> None:
    text, mask = row(length), torch.ones(1, length)
    means = F.adaptive_avg_pool1d(text.transpose(1, 2), 8).transpose(1, 2)
    pooled = WeightedPooling(D, 0.5, slots=8, content_scores=True)(text, mask, FixedSlots(8))
    torch.testing.assert_close(
        pooled.slots, F.layer_norm(means, (D,), torch.full((D,), 0.5), eps=1e-12), atol=1e-5, rtol=1e-5
    )
    exact = MeanPool(D, 0.5, project=False, norm=False)(text, mask, FixedSlots(8))
    torch.testing.assert_close(exact.slots, means, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(MeanPool(D, 0.5)(text, mask, FixedSlots(8)).slots, pooled.slots, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_pooling_interpolates_its_table_over_a_bin() -> None:
    compressor = WeightedPooling(D, 1.0, slots=3, max_length=12)
    compressor.table.copy_(torch.randn(3, 4, generator=torch.Generator().manual_seed(2)))
    for length in (12, 6, 21, 30):
        weights = compressor(row(length), torch.ones(1, length), FixedSlots(3)).aux["weights"][0]
        size = length // 3
        for slot in range(3):
            scores = F.interpolate(compressor.table[None, slot : slot + 1], size=size, mode="linear")[0, 0]
            expected = torch.zeros(length)
            expected[slot * size : (slot + 1) * size] = scores.softmax(-1)
            torch.testing.assert_close(weights[slot], expected, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_windows_of_a_mean_pool_have_the_size_of_the_ratio() -> None:
    text = row(11)
    pooled = MeanPool(D, 1.0, project=False, norm=False)(text, torch.ones(1, 11), FixedRatio(4))
    expected = torch.stack([text[0, 0:4].mean(0), text[0, 4:8].mean(0), text[0, 8:11].mean(0)])
    torch.testing.assert_close(pooled.slots[0], expected)
    for ratio in (1.1, 2.5, 3.3, 4.7):
        lengths = torch.arange(1, 200)
        counts = FixedRatio(ratio).counts(lengths)
        found = windows(plan(lengths.tolist(), counts.tolist(), ratio))
        sizes = (found.end - found.start).where(torch.arange(found.end.shape[1]) < counts[:, None], 1)
        assert (sizes > 0).all()
        last = (counts - 1)[:, None]
        assert torch.equal(found.end.gather(1, last)[:, 0], lengths)
        assert torch.equal(found.start[:, 1:], found.end[:, :-1])


@torch.no_grad()
def test_the_convolution_sees_what_a_plain_one_sees_inside_the_text() -> None:
    compressor = Convolution(D, 1.0, slots=4, max_length=16)
    text = row(30)
    plain = F.conv1d(text.transpose(1, 2), compressor.conv.weight, compressor.conv.bias, groups=D).transpose(1, 2)
    frames, lengths = compressor._frames(text, torch.ones(1, 30).bool(), torch.tensor([30]))
    assert lengths.tolist() == [30]
    torch.testing.assert_close(frames[:, 3:26], plain, atol=1e-5, rtol=1e-5)
    # At the edge the kernel's weights on the text count for those beside it.
    first = (text[0, :5].T * compressor.conv.weight[:, 0, 3:]).sum(-1) * 8 / 5 + compressor.conv.bias
    torch.testing.assert_close(frames[0, 0], first, atol=1e-5, rtol=1e-5)
    strided = Convolution(D, 1.0, slots=4, max_length=16, stride_mode="strided")
    frames, lengths = strided._frames(text, torch.ones(1, 30).bool(), torch.tensor([30]))
    assert frames.shape[1] == int(lengths) == 30 // 4 + 1


def test_budgets() -> None:
    lengths = torch.tensor([0, 1, 7, 8, 9, 100])
    assert FixedSlots(8).counts(lengths).tolist() == [0, 8, 8, 8, 8, 8]
    assert FixedSlots(8, policy="cap").counts(lengths).tolist() == [0, 1, 7, 8, 8, 8]
    assert FixedRatio(4).counts(lengths).tolist() == [0, 1, 2, 2, 3, 25]
    assert FixedSlots(8, policy="refuse").counts(torch.tensor([8, 9])).tolist() == [8, 8]
    with pytest.raises(UserError, match=r"budget.slots: 8 slots are more than the 7 tokens of a text"):
        FixedSlots(8, policy="refuse").counts(torch.tensor([9, 7]))
    with pytest.raises(UserError, match=r"budget.slots must be at least 1"):
        FixedSlots(0)
    with pytest.raises(UserError, match=r"budget.ratio must be at least 1"):
        FixedRatio(0.5)


@pytest.mark.parametrize("name", ["cross_attention", "pooling", "latent"])
def test_more_slots_than_the_compressor_has(name: str) -> None:
    with pytest.raises(UserError, match=r"budget: asks for 20 slots, more than the 16"):
        made(name, slots=16)(row(40), torch.ones(1, 40), FixedRatio(2))


def test_settings_that_do_not_fit() -> None:
    with pytest.raises(UserError, match=r"compressor.heads: 5 do not divide"):
        CrossAttention(D, 1.0, heads=5)
    with pytest.raises(UserError, match=r"compressor.iterations must be at least 1"):
        CrossAttention(D, 1.0, iterations=0)
    with pytest.raises(UserError, match=r"compressor.slots must be at least 1"):
        Latent(D, 1.0, slots=0)


@every
@torch.no_grad()
def test_long_texts_are_compressed_in_pieces(name: str) -> None:
    compressor = made(name, slots=4)
    lengths = torch.tensor([25, 8])
    mask = torch.arange(25) < lengths[:, None]
    ids = torch.arange(50).view(2, 25)
    states = row(50)[0]
    pieces, valid = split(ids, mask, 10)
    assert pieces.shape == (6, 10)
    assert valid.sum(-1).tolist() == [10, 10, 5, 8, 0, 0]
    joined = join(compressor(states[pieces], valid, FixedSlots(4)), 2)
    assert joined.mask.sum(-1).tolist() == [12, 4]
    expected = compressor(states[ids[:1, 10:20]], torch.ones(1, 10), FixedSlots(4)).slots[0]
    torch.testing.assert_close(joined.slots[0, 4:8], expected, atol=1e-5, rtol=1e-5)
    short = split(ids, mask, 25)
    assert short[0] is ids
    whole = compressor(states[ids], mask, FixedSlots(4))
    assert join(whole, 2) is whole


def test_bins_of_no_slot_are_empty() -> None:
    bins = even_bins(torch.tensor([5, 0]), plan([5, 0], [3, 0]))
    assert isinstance(bins, Bins)
    assert bins.start.tolist() == [[0, 1, 3], [0, 0, 0]]
    assert bins.end.tolist() == [[2, 4, 5], [0, 0, 0]]
