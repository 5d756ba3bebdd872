"""What compressors read from a model, and how the model reads what they write."""

from typing import Any

import pytest
import torch
from torch.nn.attention.flex_attention import create_mask

from kvc.core.backbone import Backbone, Lora, decoder
from kvc.errors import UserError
from kvc.methods.squad import CrossAttention, FixedRatio, FixedSlots, MeanPool, Source
from kvc.methods.squad.assembly import LmInput, Part, assemble, tokens
from kvc.methods.squad.interface import Slots
from kvc.methods.squad.scale import embedding_rms
from kvc.methods.squad.source import two_way

IDS = torch.arange(10, 34).view(2, 12)
MASK = torch.arange(12) < torch.tensor([12, 7])[:, None]


def model(folder: Any, **settings: Any) -> Any:
    return Backbone(pretrained=str(folder), **settings).load().eval()


@pytest.mark.parametrize("states", ["embeddings", "hidden:0", "hidden:1", "hidden:2", "hidden:last"])
@torch.no_grad()
def test_causal_states_are_those_of_the_model(tiny_folder: Any, states: str) -> None:
    base = model(tiny_folder)
    found = Source(states, bidirectional=False).encode(base, IDS, MASK)
    output = base(input_ids=IDS[1:, :7], output_hidden_states=True)
    expected = {
        "embeddings": base.get_input_embeddings()(IDS[1:, :7]),
        "hidden:last": decoder(base)(IDS[1:, :7]).last_hidden_state,
    }
    wanted = expected[states] if states in expected else output.hidden_states[int(states[-1])]
    torch.testing.assert_close(found[1:, :7], wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_bidirectional_states_see_what_follows_but_no_padding(tiny_folder: Any, attention: Any) -> None:
    base, source = model(tiny_folder, attn_implementation=attention), Source()
    found = source.encode(base, IDS, MASK)
    assert found.isfinite().all()
    alone = source.encode(base, IDS[1:, :7], MASK[1:, :7])
    torch.testing.assert_close(found[1:, :7], alone, atol=1e-5, rtol=1e-5)
    changed = IDS.clone()
    changed[1, 6] = 99
    other = source.encode(base, changed, MASK)
    assert not torch.allclose(other[1, 0], found[1, 0], atol=1e-3)
    changed = IDS.clone()
    changed[1, 8] = 99
    torch.testing.assert_close(source.encode(base, changed, MASK)[1, :7], found[1, :7])
    reference = source.encode(model(tiny_folder), IDS, MASK)
    torch.testing.assert_close(found[MASK], reference[MASK], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("states", ["embeddings", "hidden:1", "hidden:last"])
@pytest.mark.parametrize("bidirectional", [True, False])
@torch.no_grad()
def test_states_are_those_of_a_text_behind_bos(tiny_folder: Any, states: str, bidirectional: bool) -> None:
    base, source = model(tiny_folder), Source(states, bidirectional=bidirectional)
    found = source.encode(base, IDS, MASK, bos=1)
    assert found.shape == (2, 12, 32)
    for row, size in enumerate((12, 7)):
        whole = torch.cat([torch.ones(1, 1).long(), IDS[row : row + 1, :size]], dim=1)
        expected = source.encode(base, whole, torch.ones_like(whole))[:, 1:]
        torch.testing.assert_close(found[row : row + 1, :size], expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_residual_states_are_half_as_large_as_the_embeddings_they_are_added_to(tiny_folder: Any) -> None:
    base = model(tiny_folder)
    found = Source("hidden:1", bidirectional=False, residual=True).encode(base, IDS, MASK, bos=1)
    states = Source("hidden:1", bidirectional=False).encode(base, IDS, MASK, bos=1)
    rows = base.get_input_embeddings()(IDS)
    added = found - rows
    ones = torch.ones(IDS.shape)
    torch.testing.assert_close(torch.cosine_similarity(added, states, dim=-1)[MASK], ones[MASK], atol=1e-4, rtol=0)
    sizes = added.square().mean(-1).sqrt() / rows.square().mean(-1).sqrt()
    torch.testing.assert_close(sizes[MASK], 0.5 * ones[MASK], atol=1e-4, rtol=0)
    with pytest.raises(UserError, match=r"source.residual: adds the embeddings to contextual states"):
        Source("embeddings", residual=True)


@pytest.mark.parametrize("frozen", [True, False])
def test_gradient_of_the_source_reaches_adapters_only_where_asked(tiny_folder: Any, frozen: bool) -> None:
    wrapped = model(tiny_folder, lora=Lora(r=2, dropout=0.0))
    for name, parameter in wrapped.named_parameters():
        if ".lora_B" in name:
            parameter.data.normal_(std=0.2)
    found = Source(frozen=frozen).encode(wrapped, IDS, MASK)
    assert found.requires_grad == (not frozen)
    plain = Source().encode(model(tiny_folder), IDS, MASK)
    assert torch.allclose(found[MASK], plain[MASK], atol=1e-5) == frozen
    if not frozen:
        found[MASK].square().sum().backward()
        grads = [p.grad for name, p in wrapped.named_parameters() if ".lora_A" in name]
        assert all(grad is not None and grad.any() for grad in grads)


def test_a_block_mask_says_the_same(tiny_folder: Any) -> None:
    base = model(tiny_folder)
    mask = torch.cat([MASK, torch.zeros(1, 12, dtype=torch.bool)])
    dense = two_way(base, mask)
    base.config._attn_implementation = "flex_attention"
    block: Any = two_way(base, mask)
    assert torch.equal(create_mask(block.mask_mod, 3, 1, 12, 12, device="cpu"), dense)
    base.config._attn_implementation = "flash_attention_2"
    with pytest.raises(UserError, match=r"flash_attention_2 takes no mask both ways"):
        two_way(base, mask)


def test_embedding_rows_are_detached(tiny_folder: Any) -> None:
    base = model(tiny_folder)
    base.requires_grad_(True)
    assert not Source("embeddings").encode(base, IDS, MASK).requires_grad


def test_sources_that_are_none(tiny_folder: Any) -> None:
    for name in ("hidden", "hidden:-1", "hidden:x", "text"):
        with pytest.raises(UserError, match=r"source.states: '.*' is unknown, use embeddings, hidden:last or hidden:"):
            Source(name)
    Source("hidden:2").check(model(tiny_folder))
    with pytest.raises(UserError, match=r"source.states: hidden:3, but the model has 2 layers"):
        Source("hidden:3").check(model(tiny_folder))


def parts(base: Any) -> tuple[Part, Slots, Part, Part]:
    """Two rows: 2 and 1 tokens of head, 4 and 2 slots, 3 and 5 of tail, 2 and 3 of answer."""
    table = base.get_input_embeddings()

    def part(first: int, lengths: list[int], predicted: bool = False) -> Part:
        size = max(lengths)
        ids = first + torch.arange(2 * size).view(2, size)
        return tokens(table, ids, torch.arange(size) < torch.tensor(lengths)[:, None], predicted)

    states = torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(0))
    mask = torch.arange(16) < torch.tensor([16, 8])[:, None]
    slots = MeanPool(32, embedding_rms(table))(states, mask, FixedRatio(4))
    return part(10, [2, 1]), slots, part(30, [3, 5]), part(50, [2, 3], predicted=True)


def row(given: tuple[Part, Slots, Part, Part], index: int) -> tuple[Part, Slots, Part, Part]:
    """One row without padding."""
    head, slots, tail, answer = given

    def cut(part: Part) -> Part:
        keep = part.mask[index]
        labels = None if part.labels is None else part.labels[index : index + 1, keep]
        return Part(part.embeds[index : index + 1, keep], part.mask[index : index + 1, keep], labels)

    keep = slots.mask[index]
    alone = Slots(slots.slots[index : index + 1, keep], slots.mask[index : index + 1, keep], {})
    return cut(head), alone, cut(tail), cut(answer)


@torch.no_grad()
def test_parts_follow_each_other(tiny_folder: Any) -> None:
    base = model(tiny_folder)
    head, slots, tail, answer = given = parts(base)
    whole = assemble(*given)
    assert whole.inputs_embeds.shape == (2, 11, 32)
    assert whole.attention_mask.tolist() == [[1] * 11, [1] * 11]
    assert whole.position_ids.tolist() == [[*range(11)]] * 2
    assert whole.labels[0].tolist() == [-100] * 9 + [50, 51]
    assert whole.labels[1].tolist() == [-100] * 8 + [53, 54, 55]
    expected = torch.cat([head.embeds[1, :1], slots.slots[1, :2], tail.embeds[1, :5], answer.embeds[1, :3]])
    assert torch.equal(whole.inputs_embeds[1], expected)
    prompt = assemble(head, slots, tail)
    assert prompt.attention_mask.tolist() == [[1] * 9, [0] + [1] * 8]
    assert prompt.position_ids.tolist() == [[*range(9)], [0, *range(8)]]
    assert not prompt.inputs_embeds[1, 0].any()
    assert (prompt.labels == -100).all()


@pytest.mark.parametrize("positions", ["compact", "spread"])
@torch.no_grad()
def test_a_row_in_a_batch_is_the_row_alone(tiny_folder: Any, positions: Any) -> None:
    base = model(tiny_folder)
    head, slots, tail, answer = parts(base)
    lengths = torch.tensor([16, 8])
    for last in (answer, None):
        whole = assemble(head, slots, tail, last, lengths, positions)
        logits = base(**whole.arguments()).logits
        for index in range(2):
            parted = row((head, slots, tail, answer), index)
            alone = assemble(*parted[:3], parted[3] if last else None, lengths[index : index + 1], positions)
            expected = base(**alone.arguments()).logits[0]
            size = len(expected)
            torch.testing.assert_close(logits[index, -size:], expected, atol=1e-4, rtol=1e-4)
            assert torch.equal(whole.labels[index, -size:], alone.labels[0])


@torch.no_grad()
def test_spread_positions_keep_the_places_of_the_text(tiny_folder: Any) -> None:
    base = model(tiny_folder)
    head, slots, tail, answer = parts(base)
    whole = assemble(head, slots, tail, answer, torch.tensor([16, 8]), "spread")
    # Slots in the middle of their windows of 4: 1.5, rounded to even, and so on; then the tail after the text.
    assert whole.position_ids[0].tolist() == [0, 1, 4, 8, 12, 16, 18, 19, 20, 21, 22]
    assert whole.position_ids[1].tolist() == [0, 3, 7, 9, 10, 11, 12, 13, 14, 15, 16]
    # More slots than tokens: they share positions, inside the text.
    short = assemble(head, slots, tail, None, torch.tensor([2, 1]), "spread").position_ids
    assert short[0].tolist() == [0, 1, 2, 2, 3, 3, 4, 5, 6]
    assert short[1].tolist()[1:] == [0, 1, 1, 2, 3, 4, 5, 6]
    # A gap, as where pieces of a text have other numbers of slots: positions are those of the slots that there are.
    gap = Slots(slots.slots, torch.tensor([[True, False, True, True], [False, True, False, True]]), {})
    found = assemble(head, gap, tail, None, torch.tensor([15, 8]), "spread").position_ids
    assert found[0].tolist()[-6:] == [4, 9, 14, 17, 18, 19]
    assert found[1].tolist()[-8:] == [0, 3, 7, 9, 10, 11, 12, 13]
    with pytest.raises(ValueError, match="spread positions need the lengths"):
        assemble(head, slots, tail, positions="spread")


@pytest.mark.parametrize("positions", ["compact", "spread"])
@torch.no_grad()
def test_generate_reads_the_input_and_returns_new_tokens_only(tiny_folder: Any, positions: Any) -> None:
    base = model(tiny_folder)
    head, slots, tail, _ = given = parts(base)
    lengths = torch.tensor([16, 8])
    prompt = assemble(head, slots, tail, None, lengths, positions)
    found = base.generate(**prompt.arguments(), max_new_tokens=5, do_sample=False, eos_token_id=None)
    assert found.shape == (2, 5)
    for index in range(2):
        parted, answer = row(given, index), []
        for _ in range(5):
            said = torch.tensor([answer], dtype=torch.long)
            more = tokens(base.get_input_embeddings(), said, torch.ones_like(said)) if answer else None
            whole = assemble(*parted[:3], more, lengths[index : index + 1], positions)
            answer.append(int(base(**whole.arguments()).logits[0, -1].argmax()))
        assert found[index].tolist() == answer


@pytest.mark.parametrize("states", ["embeddings", "hidden:last"])
def test_the_loss_trains_the_compressor_and_nothing_else(tiny_folder: Any, states: str) -> None:
    base = model(tiny_folder)
    table = base.get_input_embeddings()
    head, _, tail, answer = parts(base)
    compressor = CrossAttention(32, embedding_rms(table), slots=4)
    slots = compressor(Source(states).encode(base, IDS, MASK), MASK, FixedSlots(4))
    whole: LmInput = assemble(head, slots, tail, answer)
    base(**whole.arguments(), labels=whole.labels).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in compressor.parameters())
    assert compressor.queries.grad is not None
    assert compressor.queries.grad.any()
    assert all(p.grad is None for p in base.parameters())


@torch.no_grad()
def test_slots_take_the_type_of_the_model(tiny_folder: Any) -> None:
    base = model(tiny_folder, dtype="bfloat16")
    source = Source().encode(base, IDS, MASK)
    slots = MeanPool(32, 1.0)(source, MASK, FixedSlots(4))
    assert (source.dtype, slots.slots.dtype) == (torch.bfloat16, torch.float32)
    head, _, tail, _ = parts(base)
    assert assemble(head, slots, tail).inputs_embeds.dtype == torch.bfloat16
