"""Segments, substeps, scores and soft prompts, each alone."""

import doctest
import math
from typing import Any

import pytest
import torch
from autocompressor_tiny import SCALED, adapted, base, fixed, variable
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from kvc.errors import UserError
from kvc.methods.autocompressor import AutoCompressorModel
from kvc.methods.autocompressor import model as model_file
from kvc.methods.autocompressor.controls import OwnControls, TableControls
from kvc.methods.autocompressor.fixed import FixedSummary
from kvc.methods.autocompressor.metrics import segment_scores, token_scores
from kvc.methods.autocompressor.segments import random_segment_lengths, split_lengths
from kvc.methods.autocompressor.softprompt import SoftPrompt
from kvc.methods.autocompressor.stack import Stack
from kvc.methods.autocompressor.substeps import fixed_substeps, random_substeps, substep_readings


def text(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 64, shape, generator=torch.Generator().manual_seed(seed))


def test_split_lengths() -> None:
    assert split_lengths(10, None) == [10]
    assert split_lengths(10, 4) == [4, 4, 2]
    assert split_lengths(8, 4) == [4, 4]
    assert split_lengths(7, [3, 4]) == [3, 4]
    for lengths in (0, [3, 3], [7, 0]):
        with pytest.raises(UserError, match="segment_lengths"):
            split_lengths(7, lengths)


@pytest.mark.parametrize(("length", "segments", "positions"), [(3072, 2, 2048), (40, 3, 64), (100, 3, 64), (8, 4, 9)])
def test_random_lengths_keep_their_bounds(length: int, segments: int, positions: int) -> None:
    least = max(math.ceil((length - positions) / (segments - 1)), 2)
    generator = torch.Generator().manual_seed(0)
    if length - segments * least < segments - 1:
        with pytest.raises(UserError, match="cannot be cut"):
            random_segment_lengths(length, segments, positions, generator)
        return
    for _ in range(300):
        lengths = random_segment_lengths(length, segments, positions, generator)
        assert sum(lengths) == length
        assert len(lengths) == segments
        assert lengths[0] >= least
        assert min(lengths[1:]) >= least + 1
        assert max(lengths) <= positions


def test_every_cut_is_as_likely_as_any_other() -> None:
    generator = torch.Generator().manual_seed(0)
    counts: dict[tuple[int, ...], int] = {}
    for _ in range(6000):
        drawn = tuple(random_segment_lengths(10, 3, 64, generator))
        counts[drawn] = counts.get(drawn, 0) + 1
    assert len(counts) == math.comb(4, 2)
    assert max(abs(count - 1000) for count in counts.values()) < 150


def test_a_least_length_may_be_asked_for() -> None:
    generator = torch.Generator().manual_seed(0)
    assert all(min(random_segment_lengths(40, 3, 64, generator, min_length=8)) >= 8 for _ in range(50))
    with pytest.raises(UserError, match="min_length"):
        random_segment_lengths(100, 2, 60, min_length=3)
    assert random_segment_lengths(5, 1, 9) == [5]


def test_substeps_take_the_end_of_a_block() -> None:
    found = fixed_substeps(50, 2, [13, 11])
    assert [(s.start, s.stop, s.segment_lengths) for s in found] == [(2, 26, [13, 11]), (26, 50, [13, 11])]
    with pytest.raises(UserError, match="block_size: 40"):
        fixed_substeps(40, 2, [13, 11])
    with pytest.raises(UserError, match="training_substeps"):
        fixed_substeps(40, 0, [13])


def test_random_substeps_cover_the_block_and_follow_their_generator() -> None:
    one, two, other = (random_substeps(101, 3, 2, 64, torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert one == two
    assert one != other
    assert [(s.start, s.stop) for s in one] == [(0, 33), (33, 67), (67, 101)]
    assert all(sum(s.segment_lengths) == s.stop - s.start for s in one)


@pytest.mark.parametrize("maker", [fixed, variable])
def test_substeps_hand_on_what_they_cut_from_the_graph(maker: Any) -> None:
    compressor, ids = maker(), text(2, 24)
    compressor.model.train()
    substeps = fixed_substeps(24, 2, [6, 6])
    first, second = (read() for read in substep_readings(compressor, substeps, ids))
    whole = compressor.read(ids, segment_lengths=6)
    torch.testing.assert_close(torch.cat([first.hidden, second.hidden], dim=1), whole.hidden)
    embedding = compressor.model.get_input_embeddings().weight
    of_second = torch.autograd.grad(compressor.loss(second, ids[:, 12:])[0], embedding, retain_graph=True)[0]
    alone = compressor.read(ids[:, 12:], segment_lengths=6, softprompt=first.prompt.detach())
    expected = torch.autograd.grad(compressor.loss(alone, ids[:, 12:])[0], embedding)[0]
    torch.testing.assert_close(of_second, expected)


@torch.no_grad()
def test_scores_of_segments() -> None:
    logits, labels = torch.randn(2, 9, 20), torch.randint(0, 20, (2, 9))
    labels[1, 5:] = -100
    nll, right, chosen = token_scores(logits, labels)
    whole, (first, second) = segment_scores(logits, labels, [4, 5])
    assert first.tokens.tolist() == [4, 4]
    assert second.tokens.tolist() == [4, 0]
    torch.testing.assert_close(first.nll + second.nll, whole.nll)
    assert torch.equal(whole.tokens, chosen.sum(-1))
    assert torch.equal(whole.right, right.sum(-1))
    expected = -logits[0, 3].log_softmax(-1)[labels[0, 4]]
    torch.testing.assert_close(nll[0, 3], expected)
    assert torch.isnan(second.mean_nll[1])


def test_soft_prompts_join_and_choose() -> None:
    one = SoftPrompt(torch.ones(2, 2, 3), torch.tensor([[True, False], [True, True]]))
    two = SoftPrompt(torch.full((2, 1, 3), 2.0), None, torch.zeros(2, 1), uses=1)
    both = one.append(two)
    assert both.lengths.tolist() == [2, 3]
    assert both.log_gate is not None
    assert both.log_gate.shape == (2, 3)
    chosen = one.where(torch.tensor([True, False]), two)
    assert chosen.lengths.tolist() == [1, 1]
    assert chosen.vectors[1, 0].tolist() == [2, 2, 2]
    empty = SoftPrompt.empty(torch.zeros(2, 5, 3))
    assert empty.append(one).vectors is one.vectors
    assert SoftPrompt(torch.ones(1, 2, 3)).expand(4).vectors.shape == (4, 2, 3)
    with pytest.raises(ValueError, match="2 rows do not fit"):
        one.expand(3)
    with pytest.raises(ValueError, match="softprompt"):
        SoftPrompt.of(torch.ones(2, 3))


def test_a_tokenizer_without_the_control_tokens() -> None:
    class Tokenizer:
        def get_vocab(self) -> dict[str, int]:
            return {"<eoc>": 5}

    with pytest.raises(UserError, match="<sum>"):
        TableControls.of(Tokenizer())  # type: ignore[arg-type]


def test_eos_survives_several_ids_and_peft() -> None:
    model = adapted(base(eos_token_id=[7, 9]))
    summary = FixedSummary(model, 2)
    assert torch.equal(summary.embed_summary.weight[0], model.get_input_embeddings().weight[7])
    with pytest.raises(UserError, match="stop_head"):
        OwnControls(model, "other")  # type: ignore[arg-type]


@pytest.mark.parametrize("family", SCALED)
@torch.no_grad()
def test_logits_and_loss_are_those_of_the_familys_own_forward(family: str) -> None:
    compressor = fixed(family)
    model, ids = compressor.model, torch.arange(3, 17).view(2, 7)
    before = compressor.read(ids.flip(-1), output_softprompt=True).prompt
    embeddings = torch.cat([before.vectors, model.get_input_embeddings()(ids)], dim=1)
    labels = torch.cat([torch.full(before.vectors.shape[:2], -100), ids], dim=1)
    labels[:, 3] = -100  # what predicts the first token of the text stands before it
    own = model(inputs_embeds=embeddings, labels=labels)
    reading = compressor.read(ids, softprompt=before)
    torch.testing.assert_close(compressor.logits(reading.hidden), own.logits[:, 3:])
    assert not torch.allclose(model.get_output_embeddings()(reading.hidden), own.logits[:, 3:])
    total, count = compressor.loss(reading, ids)
    torch.testing.assert_close(total / count, own.loss)


@pytest.mark.parametrize("family", SCALED)
@torch.no_grad()
def test_stopping_is_a_token_of_the_familys_own_forward(family: str) -> None:
    """`<eoc>` as the last row of the table, and with a row of its own over the shorter table."""
    whole, short = base(family, vocab_size=66), base(family, vocab_size=66)
    table = TableControls(64, 65, rival=False)
    row = whole.get_output_embeddings().weight[65].clone()
    short.resize_token_embeddings(64)
    own = OwnControls(short, "vocabulary")
    own.eoc_weight.copy_(row)
    hidden = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    one, two = table.stop(Stack(whole).logits, hidden), own.stop(Stack(short).logits, hidden)
    torch.testing.assert_close(one.logit, two.logit)
    shell = whole.get_output_embeddings()(hidden)
    plain = shell[:, 65] - shell[:, :64].logsumexp(-1)
    assert not torch.allclose(one.logit, plain, atol=1e-3)


def test_other_learned_positions_are_refused() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=20, n_positions=16))
    with pytest.raises(UserError, match="table"):
        Stack(model)


def test_the_example_of_the_module() -> None:
    assert doctest.testmod(model_file).failed == 0


@torch.no_grad()
def test_flash_attention_is_told_that_a_row_is_one_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    """From positions that restart it would guess several."""
    told: list[Any] = []
    kernels = {"stub": "flash_attention_2"}
    monkeypatch.setattr("kvc.methods.autocompressor.stack.kernel_of", lambda name: kernels.get(name, name))

    def attend(module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
        told.append((kwargs.get("cu_seq_lens_q"), kwargs.get("max_length_k"), mask))
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)

    AttentionInterface.register("stub", attend)
    AttentionMaskInterface.register("stub", lambda *args, **kwargs: None)
    exact, flash = fixed("opt"), fixed(model=base("opt", "stub"))
    ids = text(1, 12)
    one, two = (c.read(ids, segment_lengths=6, output_softprompt=True) for c in (exact, flash))
    torch.testing.assert_close(one.prompt.vectors, two.prompt.vectors)
    assert told[-1][0].tolist() == [0, 3 + 6 + 3]
    assert told[-1][1] == 12


@torch.no_grad()
def test_the_model_as_one_would_use_it() -> None:
    """The lines of the documentation, with the vectors alone handed on."""
    model = AutoCompressorModel(base(), variable().summary).eval()
    model.compressor.summary.to(model.device)
    context, following, prompt = text(3, 20), text(3, 6, seed=1), text(3, 4, seed=2)
    out = model(context, torch.ones_like(context), output_softprompt=True)
    assert torch.equal(model.compress_context(context).vectors, out.softprompt)
    after = model(following, softprompt=out.softprompt, labels=following)
    same = model(following, softprompt=out.prompt, labels=following)
    torch.testing.assert_close(after.logits, same.logits)
    assert torch.isfinite(after.loss)
    halves = model(context, segment_lengths=[10, 10])
    assert (
        halves.softprompt_mask.sum(-1).tolist()
        == model(context[:, :10], output_softprompt=True).prompt.lengths.tolist()
    )
    tokens = model.generate(prompt, softprompt=out.softprompt, max_new_tokens=5, eos_token_id=None)
    assert tokens.shape == (3, 9)
    embedded = model(inputs_embeds=model.backbone.get_input_embeddings()(context), output_softprompt=True)
    torch.testing.assert_close(embedded.softprompt, out.softprompt)
