"""Reading segment by segment: padding, hand-over, gradients, gates and stops."""

from typing import Any

import pytest
import torch
from autocompressor_tiny import ALL, adapted, base, fixed, padded, prompts_equal, variable

from kvc.errors import UserError
from kvc.methods.autocompressor.compressor import Compressor
from kvc.methods.autocompressor.controls import OwnControls, TableControls
from kvc.methods.autocompressor.fixed import FixedSummary
from kvc.methods.autocompressor.softprompt import SoftPrompt
from kvc.methods.autocompressor.stopping import Stopping

MAKERS: dict[str, Any] = {
    "accumulate": fixed,
    "replace": lambda *a, **k: fixed(*a, accumulate=False, **k),
    "after": variable,
    "before": lambda *a, **k: variable(*a, gate="before", **k),
    "log": lambda *a, **k: variable(*a, gate="log", **k),
}

FIXED = ("accumulate", "replace")


def text(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 64, shape, generator=torch.Generator().manual_seed(seed))


def alone(row: list[int], lengths: list[int], left: bool) -> list[int]:
    """Lengths of the segments of a row, that a padded batch cuts into the given ones."""
    gap = sum(lengths) - len(row)
    found = []
    for length in lengths if left else lengths[::-1]:
        taken = min(gap, length)
        gap -= taken
        found.append(length - taken)
    found = found if left else found[::-1]
    return [length for length in found if length]


@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
@pytest.mark.parametrize(
    ("maker", "soft"), [(name, soft) for name in MAKERS for soft in (False, True) if name not in FIXED or not soft]
)
@pytest.mark.parametrize("family", ALL)
@torch.no_grad()
def test_a_padded_batch_gives_what_its_rows_give_alone(family: str, maker: str, soft: bool, left: bool) -> None:
    compressor = MAKERS[maker](family)
    lengths = [6, 5, 4]
    rows = [text(size, seed=size).tolist() for size in (15, 12, 9, 3)]
    ids, mask = padded(rows, left)
    vectors = torch.randn(4, 2, ids_width(compressor), generator=torch.Generator().manual_seed(1))
    vectors[1, 0] = 0  # no vector
    given = SoftPrompt.of(vectors)
    whole = compressor.read(ids, mask, segment_lengths=lengths, softprompt=given, output_softprompt=True, soft=soft)
    for number, row in enumerate(rows):
        single = compressor.read(
            torch.tensor([row]),
            segment_lengths=alone(row, lengths, left),
            softprompt=SoftPrompt.of(given.vectors[number : number + 1]),
            output_softprompt=True,
            soft=soft,
        )
        torch.testing.assert_close(whole.hidden[number][mask[number].bool()], single.hidden[0], rtol=1e-4, atol=2e-5)
        prompts_equal(whole, number, single)
    if maker not in FIXED and not soft:
        assert len({int(n) for n in whole.prompt.lengths}) > 1, "rows of one length show nothing"


@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
@pytest.mark.parametrize("gate", ["after", "before", "log"])
@pytest.mark.parametrize("rule", ["threshold", "greedy", "sample"])
@pytest.mark.parametrize("family", ["llama-gqa", "opt"])
@torch.no_grad()
def test_every_rule_of_stopping_treats_a_row_as_it_would_alone(family: str, rule: Any, gate: Any, left: bool) -> None:
    compressor = variable(family, gate, Stopping(rule, 0.4 if rule == "threshold" else None))
    controls: Any = compressor.summary.controls  # type: ignore[union-attr]
    # So that rows stop at different steps.
    controls.eoc_bias += {"threshold": 0.0, "greedy": 0.9 if family == "llama-gqa" else 0.6, "sample": 0.0}[rule]
    lengths = [6, 5, 4]
    rows = [text(size, seed=size).tolist() for size in (15, 12, 9, 3, 6)]
    ids, mask = padded(rows, left)

    def draws(*numbers: int) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(number) for number in numbers]

    whole = compressor.read(
        ids, mask, segment_lengths=lengths, output_softprompt=True, generator=draws(*range(len(rows)))
    )
    for number, row in enumerate(rows):
        parts = alone(row, lengths, left)
        single = compressor.read(
            torch.tensor([row]), segment_lengths=parts, output_softprompt=True, generator=draws(number)
        )
        prompts_equal(whole, number, single)
    assert len({int(n) for n in whole.prompt.lengths}) > 1, "rows of one length show nothing"
    if rule == "sample":
        with pytest.raises(ValueError, match="2 of them do not fit a batch of 5"):
            compressor.read(ids, output_softprompt=True, generator=draws(0, 1))


def ids_width(compressor: Compressor) -> int:
    return int(compressor.model.get_input_embeddings().weight.shape[1])


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("family", ["llama-gqa", "opt"])
@torch.no_grad()
def test_two_calls_equal_one(family: str, maker: str) -> None:
    compressor = MAKERS[maker](family)
    ids = text(2, 20)
    one = compressor.read(ids, segment_lengths=[7, 5, 8], output_softprompt=True)
    first = compressor.read(ids[:, :12], segment_lengths=[7, 5], output_softprompt=True)
    second = compressor.read(ids[:, 12:], softprompt=first.prompt, output_softprompt=True)
    torch.testing.assert_close(one.hidden, torch.cat([first.hidden, second.hidden], dim=1))
    torch.testing.assert_close(one.prompt.vectors, second.prompt.vectors)
    unread = compressor.read(ids, segment_lengths=[7, 5, 8])
    torch.testing.assert_close(unread.hidden, one.hidden)
    torch.testing.assert_close(unread.prompt.vectors, first.prompt.vectors)


@torch.no_grad()
def test_vectors_alone_carry_their_lengths() -> None:
    """Slots without a vector are zeros, which no one attends to."""
    compressor = variable("opt")
    ids = text(3, 10, seed=4)
    prompt = compressor.read(ids, output_softprompt=True).prompt
    assert len(set(prompt.lengths.tolist())) > 1
    again = SoftPrompt.of(prompt.vectors)
    assert torch.equal(again.valid, prompt.valid)
    mine, theirs = (compressor.read(ids, softprompt=p).hidden for p in (prompt, again))
    torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("family", ["llama-gqa", "opt"])
def test_checkpointing_gives_equal_gradients(family: str, maker: str) -> None:
    found = []
    for saving in (False, True):
        model = base(family, **({"dropout": 0.1} if family == "opt" else {"attention_dropout": 0.1}))
        compressor = MAKERS[maker](family, model=model, segment_gradient_checkpointing=saving)
        model.train()
        ids = text(2, 18)
        torch.manual_seed(5)
        reading = compressor.read(ids, segment_lengths=[7, 6, 5])
        loss, count = compressor.loss(reading, ids)
        (loss / count).backward()
        parameters = {**dict(model.named_parameters()), **dict(compressor.summary.named_parameters())}
        found.append({name: p.grad for name, p in parameters.items() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], rtol=1e-5, atol=1e-7, msg=lambda t, n=name: f"{n}: {t}")


@pytest.mark.parametrize("family", ["llama-gqa", "opt"])
@torch.no_grad()
def test_eager_attention_gives_the_same(family: str) -> None:
    ids, mask = padded([text(12).tolist(), text(8, seed=1).tolist()])
    for maker in MAKERS.values():
        one, two = (
            maker(family, model=base(family, attention)).read(
                ids, mask, segment_lengths=5, output_softprompt=True, soft=True
            )
            for attention in ("sdpa", "eager")
        )
        torch.testing.assert_close(one.hidden[mask.bool()], two.hidden[mask.bool()], rtol=1e-4, atol=2e-5)
        torch.testing.assert_close(one.prompt.vectors, two.prompt.vectors, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("family", ["llama-gqa", "opt"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mixed_precision(family: str, maker: str, dtype: torch.dtype) -> None:
    """Fully padded rows included; gates near 1 in bf16 are near those in fp32."""
    ids, mask = padded([text(12).tolist(), text(3, seed=1).tolist()])
    exact = MAKERS[maker](family)
    compressor = MAKERS[maker](family, model=base(family).to(dtype))
    for one in (exact, compressor):
        one.model.train()
    with torch.autocast("cpu", torch.bfloat16):
        reading = compressor.read(ids, mask, segment_lengths=[4, 4, 4], output_softprompt=True)
        loss, count = compressor.loss(reading, ids.masked_fill(mask == 0, -100))
    expected = exact.read(ids, mask, segment_lengths=[4, 4, 4], output_softprompt=True)
    right, _ = exact.loss(expected, ids.masked_fill(mask == 0, -100))
    (loss / count + reading.penalty).backward()
    gradients = [p.grad for p in [*compressor.model.parameters(), *compressor.summary.parameters()]]
    assert all(bool(gradient.isfinite().all()) for gradient in gradients if gradient is not None)
    assert float(loss.detach()) == pytest.approx(float(right.detach()), rel=0.1)


def test_the_loss_is_over_the_concatenation() -> None:
    compressor = fixed()
    ids = text(2, 14)
    labels = ids.clone()
    labels[0, :9] = -100
    reading = compressor.read(ids, segment_lengths=[6, 8])
    total, count = compressor.loss(reading, labels)
    logits = compressor.logits(reading.hidden)
    expected = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum", ignore_index=-100
    )
    torch.testing.assert_close(total, expected)
    assert int(count) == int((labels[:, 1:] != -100).sum()) == 5 + 13
    nothing, zero = compressor.loss(reading, torch.full_like(labels, -100))
    assert float(nothing.detach()) == 0
    assert int(zero) == 0


# ---------------------------------------------------------------------- gradients of the compression


def compression_gradient(compressor: Compressor, ids: torch.Tensor, lengths: list[int], scored: int) -> float:
    """Norm of the gradient on the embedding of `<sum>`, of the LM loss of one segment."""
    compressor.model.train()
    reading = compressor.read(ids, segment_lengths=lengths)
    labels = torch.full_like(ids, -100)
    start = sum(lengths[:scored]) + 1
    labels[:, start : start + lengths[scored] - 1] = ids[:, start : start + lengths[scored] - 1]
    compressor.loss(reading, labels)[0].backward()
    gradient = compressor.summary.controls.sum_embedding.grad
    return 0.0 if gradient is None else float(gradient.norm())


@pytest.mark.parametrize("gate", ["after", "before", "log"])
def test_the_loss_of_the_model_trains_the_compression(gate: Any) -> None:
    compressor = variable(gate=gate, truncate_bptt_segments=1)
    assert compression_gradient(compressor, text(2, 12), [6, 6], scored=1) > 1e-4
    stop = compressor.summary.controls.eoc_weight.grad
    assert stop is not None
    assert float(stop.norm()) > 1e-6, "nor does it train when to stop"


def test_cut_before_use_it_trains_nothing() -> None:
    assert compression_gradient(variable(detach_before_use=True), text(2, 12), [6, 6], scored=1) == 0


@pytest.mark.parametrize(
    ("uses", "trained"),
    [(1, [True, False, True]), (2, [True, True, False]), (None, [True, True, True])],
)
def test_the_graph_is_cut_after_as_many_uses(uses: int | None, trained: list[bool]) -> None:
    """Windows of uses + 1 segments: after the last use the next memory begins a graph of its own."""
    for scored, expected in enumerate(trained, start=1):
        compressor = variable(truncate_bptt_segments=uses)
        norm = compression_gradient(compressor, text(2, 20), [5, 5, 5, 5], scored)
        assert (norm > 0) == expected, f"segment {scored}"


def test_the_penalty_is_the_mean_over_rows_and_segments() -> None:
    compressor = variable(compression_lambda=0.5)
    compressor.summary.alpha = 2.0
    ids, mask = padded([text(10).tolist(), text(4, seed=1).tolist()])
    reading = compressor.read(ids, mask, segment_lengths=5, output_softprompt=True, soft=True)
    first, second = reading.reports
    assert first.active.tolist() == [True, False]
    expected = [
        0.5 * float(first.expected_length[0].detach()) / 5,
        0.5 * float(second.expected_length[0].detach()) / (5 + 2.0 * 4),
        0.5 * float(second.expected_length[1].detach()) / 4,
    ]
    assert float(reading.penalty.detach()) == pytest.approx(sum(expected) / 3)
    reading.penalty.backward()
    assert compressor.summary.controls.eoc_weight.grad is not None


# ---------------------------------------------------------------------- hard stops


@pytest.mark.parametrize("family", ["llama-gqa", "opt"])
@torch.no_grad()
def test_a_memory_may_be_empty(family: str) -> None:
    compressor = variable(family, stop=Stopping("threshold", 0.0))
    ids = text(2, 12)
    reading = compressor.read(ids, segment_lengths=[6, 6], output_softprompt=True)
    assert reading.prompt.lengths.tolist() == [0, 0]
    torch.testing.assert_close(reading.hidden[:, 6:], compressor.read(ids[:, 6:]).hidden)
    assert [report.expected_length.tolist() for report in reading.reports] == [[0, 0], [0, 0]]


@torch.no_grad()
def test_a_stop_drops_its_vector_or_keeps_it_as_the_gate_says() -> None:
    ids = text(6, 8, seed=2)
    after = variable(stop=Stopping("threshold", 0.4)).read(ids, output_softprompt=True)
    before = variable(gate="before", stop=Stopping("threshold", 0.4)).read(ids, output_softprompt=True)
    stops = after.reports[0].stop > 0.4
    first = torch.where(stops.any(1), stops.long().argmax(1), 4)
    assert len(set(first.tolist())) > 1
    assert after.prompt.lengths.tolist() == first.tolist()
    assert before.prompt.lengths.tolist() == (first + 1).clamp(max=4).tolist()


def test_rules_of_stopping() -> None:
    logit, top = torch.tensor([-2.0, 0.5, 3.0]), torch.tensor([False, True, True])
    assert Stopping()(0, logit, top).tolist() == [False, True, True]
    assert Stopping("threshold", 0.9)(0, logit, top).tolist() == [False, False, True]
    assert Stopping("threshold", 0.9, min_length=2)(1, logit, top).tolist() == [False, False, False]
    draws = torch.stack([Stopping("sample")(0, logit, top, torch.Generator().manual_seed(s)) for s in range(500)])
    torch.testing.assert_close(draws.float().mean(0), logit.sigmoid(), atol=0.07, rtol=0)
    with pytest.raises(UserError, match="compress_stop_threshold"):
        Stopping("threshold")
    with pytest.raises(UserError, match="compress_stop_threshold"):
        Stopping("greedy", 0.5)


@pytest.mark.parametrize("head", ["vocabulary", "binary"])
@pytest.mark.parametrize("family", ["llama-gqa", "opt"])
def test_own_control_tokens_train_under_lora_alone(family: str, head: Any) -> None:
    model = adapted(base(family), targets=["q_proj", "v_proj"])
    compressor = variable(model=model, controls=OwnControls(model, head))
    model.train()
    ids = text(2, 12)
    reading = compressor.read(ids, segment_lengths=[6, 6])
    loss, count = compressor.loss(reading, ids)
    (loss / count + reading.penalty).backward()
    trained = {name for name, p in compressor.summary.named_parameters() if p.grad is not None and p.grad.any()}
    assert {"controls.sum_embedding", "controls.eoc_weight"} <= trained
    moved = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert moved
    assert all(".lora_" in name for name in moved)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", ["llama-gqa", "opt"])
def test_rows_of_frozen_tables_train_as_copies(family: str, tied: bool) -> None:
    model = adapted(base(family, vocab_size=66, tie_word_embeddings=tied), targets=["q_proj", "v_proj"])
    controls = TableControls(64, 65, rival=False)
    compressor = variable(model=model, controls=controls)
    ids = text(2, 12)
    ids[0, 3] = 64

    def read() -> Any:
        reading = compressor.read(ids, segment_lengths=[6, 6], soft=True)
        return reading, compressor.logits(reading.hidden)

    with torch.no_grad():
        before, logits = read()
        controls.train_rows(model)
        after, again = read()
    torch.testing.assert_close(again, logits)
    torch.testing.assert_close(after.reports[0].stop, before.reports[0].stop)
    model.train()
    reading = compressor.read(ids, segment_lengths=[6, 6])
    loss, count = compressor.loss(reading, ids)
    (loss / count).backward()
    assert controls.sum_row is not None
    assert controls.eoc_row is not None
    assert controls.sum_row.grad is not None
    assert controls.sum_row.grad.any()
    assert controls.eoc_row.grad is not None
    assert controls.eoc_row.grad.any()
    with torch.no_grad():
        controls.sum_row.neg_()
        assert not torch.allclose(read()[0].hidden[0, 3], reading.hidden[0, 3], atol=1e-3), "<sum> in the text"
        controls.eoc_row.zero_()
        z = reading.reports[0].z.flatten(0, 1)
        logit = controls.stop(compressor.stack.logits, z).logit
        rivals = model.get_output_embeddings()(z)[:, :64]
        torch.testing.assert_close(logit, -rivals.logsumexp(-1))


def test_control_tokens_that_would_never_train_are_refused() -> None:
    model = adapted(base(vocab_size=66))
    compressor = variable(model=model, controls=TableControls(64, 65))
    compressor.read(text(1, 8), segment_lengths=4)
    model.train()
    with pytest.raises(UserError, match="input embeddings of the base model are frozen"):
        compressor.read(text(1, 8), segment_lengths=4)
    model.get_input_embeddings().requires_grad_(True)
    with pytest.raises(UserError, match="LM head of the base model are frozen"):
        compressor.read(text(1, 8), segment_lengths=4)
    with torch.no_grad():
        compressor.read(text(1, 8), segment_lengths=4)


@torch.no_grad()
def test_own_and_table_tokens_agree() -> None:
    """The last two rows of the tables as weights of their own, over the shorter tables."""
    whole = base("llama-gqa", vocab_size=66)
    table = variable(model=whole, controls=TableControls(64, 65), insertion="append")
    short = base("llama-gqa", vocab_size=66)
    own = OwnControls(short, "vocabulary")
    embeddings, head = (m.weight for m in (whole.get_input_embeddings(), whole.get_output_embeddings()))
    short.resize_token_embeddings(64)
    compressor = variable(model=short, controls=OwnControls(short, "vocabulary"), insertion="append")
    own = compressor.summary.controls
    own.sum_embedding.copy_(embeddings[64])
    own.eoc_weight.copy_(head[65])
    head[64].fill_(0)  # `<sum>` is one more rival of `<eoc>` where it stands in the table
    ids = text(2, 8)
    one, two = (c.read(ids, output_softprompt=True, soft=True) for c in (table, compressor))
    torch.testing.assert_close(one.hidden, two.hidden)
    torch.testing.assert_close(one.reports[0].z, two.reports[0].z)
    near = {"rtol": 0.1, "atol": 1e-3}
    torch.testing.assert_close(one.reports[0].stop, two.reports[0].stop, **near)
    assert torch.isinf(table.logits(one.hidden)[..., 64:]).all()
    torch.testing.assert_close(table.logits(one.hidden)[..., :64], compressor.logits(two.hidden))


@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
@torch.no_grad()
def test_sum_in_place_of_the_last_token_of_each_row(left: bool) -> None:
    compressor = variable(model=base(vocab_size=66), controls=TableControls(64, 65), insertion="overwrite")
    ids, mask = padded([text(8).tolist(), text(6, seed=1).tolist()], left)
    reading = compressor.read(ids, mask, segment_lengths=[4, 4])
    assert reading.unscored is not None
    found = [row.nonzero().flatten().tolist() for row in reading.unscored]
    assert found == [[3], [3]]
    assert [report.text_length.tolist() for report in reading.reports] == [[3, 1 if left else 3]]
    labels = torch.where(mask.bool(), ids, -100)
    assert int(compressor.loss(reading, labels)[1]) == int((labels[:, 1:] != -100).sum()) - 2


@torch.no_grad()
def test_rows_without_sum_keep_their_memory() -> None:
    compressor = variable(model=base(vocab_size=66), controls=TableControls(64, 65), insertion="given")
    ids = text(2, 8)
    ids[0, 7] = 64
    given = SoftPrompt.of(torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0)))
    reading = compressor.read(ids, softprompt=given, output_softprompt=True, soft=True)
    assert reading.prompt.lengths.tolist() == [4, 3]
    torch.testing.assert_close(reading.prompt.vectors[1, :3], given.vectors[1])


# ---------------------------------------------------------------------- bad input


def test_bad_input() -> None:
    compressor = fixed("opt")
    with pytest.raises(UserError, match="sum to 7"):
        compressor.read(text(1, 8), segment_lengths=[4, 3])
    with pytest.raises(UserError, match="64 positions"):
        compressor.read(text(1, 70))
    with pytest.raises(UserError, match="width 16"):
        compressor.read(text(1, 4), softprompt=SoftPrompt.of(torch.ones(1, 2, 16)))
    with pytest.raises(UserError, match="sliding window"):
        fixed(model=base("mistral", sliding_window=8)).read(text(1, 9))
    with pytest.raises(UserError, match="EOS"):
        FixedSummary(base(eos_token_id=None), 2)
    with pytest.raises(UserError, match="no row for token 70"):
        variable(controls=TableControls(64, 70))
    with pytest.raises(UserError, match="truncate_bptt_segments"):
        fixed(truncate_bptt_segments=0)
    model = base()
    model.gradient_checkpointing_enable()
    with pytest.raises(UserError, match="gradient_checkpointing"):
        variable(model=model)
