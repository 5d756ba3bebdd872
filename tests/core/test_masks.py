"""Masks say what the rules say, said a second time token by token, and both forms of them agree."""

import random

import pytest
import torch
from torch.nn.attention.flex_attention import create_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from kvc.core.masks import Kind, Layout, is_merged, visibility
from kvc.errors import UserError

KINDS: list[Kind] = [
    "full",
    "no_context",
    "concat",
    "concat_recur",
    "merge",
    "merge_recur",
    "gist",
    "pos_control",
    "neg_control",
]


def random_layout(seed: int, slots: int = 2, rows: int = 3, kept: int = 1) -> Layout:
    """Rows with 0 to 4 runs, padding on both sides, and sometimes no tail."""
    draw = random.Random(seed)
    made = []
    for row in range(rows):
        tokens: list[int] = []
        for _ in range(draw.randint(0, 4) if row else 3):
            tokens += [-1] * draw.randint(1, 4) + list(range(slots))
        made.append(tokens + [-1] * draw.randint(0 if tokens else 1, 4))
    width = max(map(len, made)) + 2
    slot, valid = torch.full((rows, width), -1), torch.zeros(rows, width, dtype=torch.bool)
    stays = torch.zeros(rows, width, dtype=torch.bool)
    for row, tokens in enumerate(made):
        start = draw.randint(0, width - len(tokens))
        slot[row, start : start + len(tokens)] = torch.tensor(tokens)
        valid[row, start : start + len(tokens)] = True
        stays[row, start : start + kept] = True
    return Layout(slot, valid, slots, stays)


def literal(layout: Layout, kind: Kind) -> list[list[list[bool]]]:
    """The rules, one pair of tokens at a time; columns of merged memory first."""
    batch, size = layout.slot.shape
    most = max(int((layout.slot[row] == layout.slots - 1).sum()) for row in range(batch))
    result = []
    for row in range(batch):
        slot, valid = layout.slot[row].tolist(), layout.valid[row].tolist()
        ends = [token for token in range(size) if slot[token] == layout.slots - 1]
        segment = [sum(end < token for end in ends) for token in range(size)]
        tail = len(ends)
        merged = {"merge_recur": list(range(most)), "merge": [tail - 1]}.get(kind, [])

        def sees(q: int, k: int, slot=slot, segment=segment, tail=tail, row=row) -> bool:
            if segment[q] == segment[k] or (layout.kept is not None and layout.kept[row, k]):
                return True
            if kind in {"full", "pos_control"}:
                return True
            if slot[k] < 0:
                return False
            if kind == "concat_recur":
                return True
            if kind == "concat":
                return segment[q] == tail
            return kind == "gist" and segment[q] == segment[k] + 1

        lines = []
        for q in range(size):
            line = [run >= 0 and run + 1 == segment[q] for run in merged for _ in range(layout.slots)]
            line += [k <= q and valid[k] and sees(q, k) for k in range(size)]
            lines.append(line)
        result.append(lines)
    return result


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("slots", [1, 2, 4])
def test_dense_mask_is_the_rule(kind: Kind, slots: int) -> None:
    for seed in range(5):
        layout = random_layout(seed, slots, kept=seed % 3)
        found = visibility(layout, kind).dense()
        expected = torch.tensor(literal(layout, kind))
        assert found.shape[1] == 1
        assert torch.equal(found[:, 0][layout.valid], expected[layout.valid])


@pytest.mark.parametrize("kind", KINDS)
def test_padding_sees_itself_and_is_seen_by_nobody(kind: Kind) -> None:
    layout = random_layout(1)
    seen = visibility(layout, kind)
    visible = seen.dense()[:, 0]
    assert visible.any(-1).all(), "an empty row"
    tokens = visible[..., seen.columns :]
    assert not (tokens & layout.valid[:, :, None] & ~layout.valid[:, None]).any()
    assert not (visible[~layout.valid][:, : seen.columns]).any()


@pytest.mark.parametrize("kind", KINDS)
def test_block_mask_is_the_dense_mask(kind: Kind) -> None:
    layout = random_layout(2, rows=4)
    seen = visibility(layout, kind)
    size, total = seen.segment.shape[1], seen.home.shape[1]
    dense = create_mask(seen.rule(), len(layout.slot), 1, size, total, "cpu")
    assert torch.equal(dense, seen.dense())
    block = seen.block(size=4)
    blocks = torch.nn.functional.pad(dense, (0, -total % 4, 0, -size % 4)).unflatten(-1, (-1, 4)).unflatten(2, (-1, 4))
    assert torch.equal(block.to_dense().bool(), blocks.any(-1).any(3))


@pytest.mark.parametrize("kind", KINDS)
def test_both_masks_give_the_same_attention(kind: Kind) -> None:
    layout = random_layout(3, rows=2)
    seen = visibility(layout, kind)
    size, total = seen.segment.shape[1], seen.home.shape[1]
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, rows, 16, generator=draw) for heads, rows in ((4, size), (2, total), (2, total)))
    dense = scaled_dot_product_attention(q, k, v, attn_mask=seen.dense(), enable_gqa=True)
    with torch.no_grad():
        sparse = flex_attention(q, k, v, block_mask=seen.block(size=16), enable_gqa=True)
    torch.testing.assert_close(sparse, dense, atol=1e-6, rtol=1e-5)
    added = scaled_dot_product_attention(q, k, v, attn_mask=seen.additive(torch.float32), enable_gqa=True)
    torch.testing.assert_close(added, dense, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_of_a_batch_has_the_mask_it_has_alone(kind: Kind) -> None:
    layout = random_layout(4)
    whole = visibility(layout, kind)
    for row in range(len(layout.slot)):
        kept = layout.kept
        assert kept is not None
        alone = visibility(
            Layout(layout.slot[row : row + 1], layout.valid[row : row + 1], layout.slots, kept[row : row + 1]), kind
        )
        both, one = whole.dense()[row, 0], alone.dense()[0, 0]
        assert torch.equal(both[:, whole.columns :], one[:, alone.columns :])
        assert torch.equal(both[:, : alone.columns], one[:, : alone.columns])
        assert not both[layout.valid[row]][:, alone.columns : whole.columns].any()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", KINDS)
def test_both_masks_give_the_same_gradients(kind: Kind) -> None:
    layout = random_layout(3, rows=2)
    assert layout.kept is not None
    layout = Layout(layout.slot.cuda(), layout.valid.cuda(), layout.slots, layout.kept.cuda())
    seen = visibility(layout, kind)
    size, total = seen.segment.shape[1], seen.home.shape[1]
    draw = torch.Generator().manual_seed(0)
    shapes = ((4, size), (2, total), (2, total))
    inputs = [torch.randn(2, heads, rows, 16, generator=draw).cuda().requires_grad_() for heads, rows in shapes]
    dense = scaled_dot_product_attention(*inputs, attn_mask=seen.dense(), enable_gqa=True)
    sparse = torch.compile(flex_attention)(*inputs, block_mask=seen.block(compiled=True), enable_gqa=True)
    weights = torch.randn(dense.shape, generator=draw).cuda() * layout.valid[:, None, :, None]
    expected = torch.autograd.grad((dense * weights).sum(), inputs)
    found = torch.autograd.grad((sparse * weights).sum(), inputs)
    for gradient, other in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, other, atol=1e-2, rtol=1e-2)


def test_segments_may_end_without_memory_tokens() -> None:
    slot, valid = torch.full((1, 6), -1), torch.ones(1, 6, dtype=torch.bool)
    kept, cut = torch.zeros_like(valid), torch.zeros_like(valid)
    kept[0, 0] = cut[0, 2] = True
    visible = visibility(Layout(slot, valid, 2, kept, cut), "no_context").dense()[0, 0].long().tolist()
    assert visible[2] == [1, 1, 1, 0, 0, 0]
    assert visible[5] == [1, 0, 0, 1, 1, 1]


def test_places_find_the_memory_tokens() -> None:
    layout = random_layout(5, slots=2, rows=3)
    for row in range(3):
        found = layout.places[row, : 2 * int(layout.runs[row])]
        assert found.tolist() == (layout.slot[row] >= 0).nonzero().flatten().tolist()


def test_controls_are_other_names() -> None:
    layout = random_layout(6)
    for name, kind in (("pos_control", "full"), ("neg_control", "no_context")):
        assert torch.equal(visibility(layout, name).dense(), visibility(layout, kind).dense())
    assert [kind for kind in KINDS if is_merged(kind)] == ["merge", "merge_recur"]


@pytest.mark.parametrize("slots", [[-1, 0], [-1, 1, 0], [0, -1, 1], [-1, 1], [0, 1, 0], [0, 1, 2]])
def test_incomplete_runs_are_refused(slots: list[int]) -> None:
    good = torch.tensor([[-1, 0, 1]])
    Layout(good, good > -2, 2).check()
    bad = torch.tensor([slots])
    with pytest.raises(UserError, match="row 0 has an incomplete run of memory tokens at token"):
        Layout(bad, bad > -2, 2).check()


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(UserError, match="kind: 'concatenate' is not one of full"):
        visibility(random_layout(0), "concatenate")  # type: ignore[arg-type]
