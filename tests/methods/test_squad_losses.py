"""Loss terms: exact values by hand, and where their gradients go."""

import math
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from kvc.core.backbone import Backbone, Lora
from kvc.errors import UserError
from kvc.methods.squad import CrossAttention, FixedSlots, Source
from kvc.methods.squad.assembly import assemble, tokens
from kvc.methods.squad.interface import Slots
from kvc.methods.squad.losses import (
    Evidence,
    FirstErrorCe,
    InfoNce,
    Kd,
    Mix,
    OffdiagMargin,
    OnPolicyKd,
    Predicted,
    SelfCritical,
    TeacherForcing,
    contrastive,
    predicted,
)
from kvc.methods.squad.losses.contrastive import infonce
from kvc.methods.squad.losses.generation import mixed_answers, until_first_error
from kvc.methods.squad.losses.geometry import alignment, slot_cosine, uniformity
from kvc.methods.squad.losses.kd import divergence
from kvc.methods.squad.scale import embedding_rms

THIRD = math.log(3)


def logits(*probabilities: list[float]) -> torch.Tensor:
    """Logits of given probabilities, plus a constant that must not matter."""
    return (torch.tensor(probabilities).log() + 5.0).requires_grad_()


def two_rows(teacher: torch.Tensor | None = None) -> Predicted:
    """Row 0 has two tokens, row 1 one token and row 2 none; the targets have probabilities 1/2, 1/4 and 1/8."""
    given = logits([0.5, 0.25, 0.25], [0.25, 0.5, 0.25], [0.125, 0.375, 0.5])
    return Predicted(given, torch.tensor([0, 0, 0]), torch.tensor([0, 0, 1]), 3, teacher)


def test_predictions_are_read_one_token_before() -> None:
    labels = torch.tensor([[-100, -100, 7, 8], [5, -100, 9, -100]])
    scores = torch.randn(2, 4, 10)
    found = predicted(scores, labels)
    assert found.targets.tolist() == [7, 8, 9]
    assert found.row.tolist() == [0, 0, 1]
    assert torch.equal(found.logits, torch.stack([scores[0, 1], scores[0, 2], scores[1, 1]]))
    torch.testing.assert_close(found.log_probs[1], scores[0, 2].log_softmax(-1)[8])
    assert two_rows().row_means(torch.tensor([1.0, 3.0, 5.0])).tolist() == [2, 5, 0]


def test_teacher_forcing_by_hand() -> None:
    loss = TeacherForcing()(Evidence(gold=two_rows()))
    assert float(loss.total.detach()) == pytest.approx(math.log(2) + math.log(4) + math.log(8))
    assert (int(loss.units), loss.per_token) == (3, True)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_divergences(beta: float) -> None:
    p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.1, 0.6, 0.3])
    teacher, student = (p.log() - 2)[None], (q.log() + 1)[None].requires_grad_()
    m = beta * p + (1 - beta) * q

    def kl(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a * (a / b).log()).sum()

    expected = {0.0: kl(p, q), 0.3: beta * kl(p, m) + (1 - beta) * kl(q, m), 1.0: kl(q, p)}[beta]
    found = divergence(student, teacher, beta)
    torch.testing.assert_close(found, expected[None])
    assert float(divergence(teacher, teacher, beta)) == pytest.approx(0, abs=1e-6)
    (gradient,) = torch.autograd.grad(found.sum(), student)
    assert gradient.abs().max() > 0.01
    warm = divergence(student, teacher, beta, temperature=2.0)
    torch.testing.assert_close(warm, 4 * divergence(student / 2, teacher / 2, beta))


def test_kd_by_hand() -> None:
    gold = two_rows()
    gold.teacher = torch.zeros(3, 3).requires_grad_()
    loss = Kd()(Evidence(gold=gold))
    rows = [[0.5, 0.25, 0.25], [0.25, 0.5, 0.25], [0.125, 0.375, 0.5]]
    expected = sum(-THIRD - sum(math.log(p) for p in row) / 3 for row in rows)
    assert float(loss.total.detach()) == pytest.approx(expected, rel=1e-5)
    assert loss.per_token
    loss.total.backward()
    assert gold.logits.grad is not None
    assert gold.logits.grad.any()
    assert gold.teacher.grad is None


def test_on_policy_kd_weighs_rows_and_not_tokens() -> None:
    own = two_rows(teacher=torch.zeros(3, 3))
    each = divergence(own.logits, torch.zeros(3, 3)).detach()
    loss = OnPolicyKd()(Evidence(own=own))
    assert float(loss.total.detach()) == pytest.approx(float((each[0] + each[1]) / 2 + each[2]))
    assert (int(loss.units), loss.per_token) == (3, False)


def test_the_first_error_ends_what_counts() -> None:
    gold = torch.tensor([[5, 6, 7, 2], [5, 6, 2, -100], [5, 2, -100, -100], [4, 5, 6, 2]])
    greedy = torch.tensor([[5, 9, 7], [5, 6, 2], [8, 2, 0], [4, 5, 6]])
    assert until_first_error(gold, greedy).int().tolist() == [
        [1, 1, 0, 0],
        [1, 1, 1, 0],
        [1, 0, 0, 0],
        [1, 1, 1, 1],
    ]
    longer = torch.cat([greedy, torch.full((4, 3), 9)], dim=1)
    assert torch.equal(until_first_error(gold, longer), until_first_error(gold, greedy))


def test_first_error_ce_by_hand() -> None:
    gold = two_rows()
    loss = FirstErrorCe()(Evidence(gold=gold, agreed=torch.tensor([True, False, True])))
    assert float(loss.total.detach()) == pytest.approx(math.log(2) + math.log(8))
    assert (int(loss.units), loss.per_token) == (3, False)
    both = FirstErrorCe()(Evidence(gold=gold, agreed=torch.tensor([True, True, True])))
    assert float(both.total) == pytest.approx((math.log(2) + math.log(4)) / 2 + math.log(8))
    loss.total.backward()
    assert gold.logits.grad is not None
    assert gold.logits.grad.any(-1).tolist() == [True, False, True]


def test_self_critical_by_hand() -> None:
    own = two_rows()
    advantage = torch.tensor([0.5, -1.0, 3.0], requires_grad=True)
    loss = SelfCritical()(Evidence(own=own, advantage=advantage))
    assert float(loss.total.detach()) == pytest.approx(0.5 * (math.log(2) + math.log(4)) / 2 - math.log(8))
    loss.total.backward()
    assert own.logits.grad is not None
    # A better sample becomes more likely, a worse one less.
    assert (own.logits.grad[:, 0] < 0).tolist() == [True, True, False]
    assert advantage.grad is None
    tie = SelfCritical()(Evidence(own=two_rows(), advantage=torch.zeros(3)))
    assert float(tie.total) == 0


def test_answers_are_mixed_by_rows() -> None:
    gold, own = torch.ones(1000, 2).long(), torch.zeros(1000, 3).long()
    answers, chosen = mixed_answers(gold, own, 0.5, torch.Generator().manual_seed(0))
    assert 400 < int(chosen.sum()) < 600
    assert answers[chosen][0].tolist() == [1, 1, -100]
    assert answers[~chosen][0].tolist() == [0, 0, 0]
    assert not mixed_answers(gold, own, 0.0, torch.Generator())[1].any()
    assert mixed_answers(gold, own, 1.0, torch.Generator())[1].all()


def test_offdiag_margin_by_hand() -> None:
    """First slots at 0, 60 and 90 degrees: cosines 1/2, 0 and cos 30."""
    angles = torch.tensor([0, math.pi / 3, math.pi / 2])
    first = 7 * torch.stack([angles.cos(), angles.sin()], dim=-1)
    slots = torch.stack([first, torch.ones(3, 2)], dim=1).requires_grad_()
    mean = (0.5 + 0 + math.cos(math.pi / 6)) / 3
    loss = OffdiagMargin()(Evidence(slots=slots))
    assert float(loss.mean) == pytest.approx(mean - 0.3, rel=1e-5)
    loss.total.backward()
    assert slots.grad is not None
    assert slots.grad[:, 0].any()
    # Other slots than the first feel nothing.
    assert not slots.grad[:, 1].any()
    below = torch.autograd.grad(OffdiagMargin(margin=mean + 0.01)(Evidence(slots=slots)).total, slots)[0]
    assert not below.any()
    one = OffdiagMargin()(Evidence(slots=slots[:1]))
    assert float(one.total) == 0
    assert not torch.autograd.grad(one.total, slots)[0].any()


def test_infonce_by_hand() -> None:
    ours = torch.tensor([[2.0, 0.0], [0.0, 3.0], [1.0, 0.0]], requires_grad=True)
    references = torch.tensor([[1.0, 0.0], [0.0, 1.0], [4.0, 0.0]], requires_grad=True)
    apart = infonce(ours, references, torch.tensor([0, 1, 2]), temperature=0.5)
    e = math.exp(2)
    assert apart.tolist() == pytest.approx(
        [math.log((2 * e + 1) / e), math.log((e + 2) / e), math.log((2 * e + 1) / e)]
    )
    # Rows 0 and 2 are about one text: neither is the other's negative.
    same = infonce(ours, references, torch.tensor([0, 1, 0]), temperature=0.5)
    assert same.tolist() == pytest.approx([math.log((e + 1) / e), math.log((e + 2) / e), math.log((e + 1) / e)])
    same.sum().backward()
    assert ours.grad is not None
    assert ours.grad.any()
    assert references.grad is None


def test_negatives_come_from_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, references = torch.randn(4, 8), torch.randn(4, 8)
    group = torch.tensor([0, 1, 2, 0])
    whole = infonce(ours, references, group)
    others = {torch.float32: references, torch.int64: group}
    monkeypatch.setattr(contrastive, "_all_ranks", lambda values: others[values.dtype])
    for rank in (0, 1):
        monkeypatch.setattr(contrastive, "_rank", lambda rank=rank: rank)
        rows = slice(2 * rank, 2 * rank + 2)
        torch.testing.assert_close(infonce(ours[rows], references[rows], group[rows]), whole[rows])


def test_infonce_module_projects_the_mean_of_real_slots() -> None:
    torch.manual_seed(0)
    term = InfoNce()
    mix = Mix([term], 4)
    slots = torch.randn(2, 3, 4, requires_grad=True)
    mask = torch.tensor([[True, True, True], [True, False, False]])
    reference, group = torch.randn(2, 4), torch.tensor([3, 4])
    loss = term(Evidence(slots=slots, slot_mask=mask, reference=reference, group=group))
    means = torch.stack([slots[0].mean(0), slots[1, 0]])
    torch.testing.assert_close(loss.total, infonce(term.head(means), reference, group).sum())
    loss.total.backward()
    assert slots.grad is not None
    assert slots.grad.any(-1).tolist() == mask.tolist()
    assert all(p.grad is not None and p.grad.any() for p in mix.parameters())
    assert len(list(mix.parameters())) == 4


def test_geometry_by_hand() -> None:
    slots = torch.tensor([[[1.0, 0.0], [0.0, 2.0], [3.0, 0.0]], [[1.0, 1.0], [5.0, 5.0], [9.0, -9.0]]])
    assert float(slot_cosine(slots, torch.ones(2, 3).bool())) == pytest.approx((1 + 0 + 0 + 1 + 0 + 0) / 6)
    mask = torch.tensor([[True, True, False], [True, True, False]])
    assert float(slot_cosine(slots, mask)) == pytest.approx(0.5)
    assert float(slot_cosine(slots[:, :1], mask[:, :1])) == 0
    rows = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    assert float(alignment(rows, torch.tensor([[3.0, 0.0], [1.0, 0.0]]))) == pytest.approx(1)
    assert float(uniformity(rows)) == pytest.approx(-4, rel=1e-5)
    assert float(uniformity(torch.ones(3, 2))) == pytest.approx(0, abs=1e-5)


def test_terms_are_weighed_and_logged_raw() -> None:
    slots = torch.ones(3, 2, 4, requires_grad=True)
    mix = Mix([TeacherForcing(0.5), OffdiagMargin(0.2, margin=0.3)], 4)
    assert mix.needs == {"gold", "slots"}
    found = mix(Evidence(gold=two_rows(), slots=slots), torch.tensor(3))
    nll = math.log(2) + math.log(4) + math.log(8)
    # The mean over rows enters times the number of tokens.
    assert float(found.loss_sum) == pytest.approx(0.5 * nll + 0.2 * 0.7 * 3, rel=1e-5)
    assert {key: float(value) for key, value in found.raw.items()} == pytest.approx(
        {"teacher_forcing": nll / 3, "contrastive": 0.7}, rel=1e-5
    )
    assert not any(value.requires_grad for value in found.raw.values())


def test_losses_that_make_no_sense() -> None:
    with pytest.raises(UserError, match="losses: give at least one term"):
        Mix([], 4)
    with pytest.raises(UserError, match="losses: generation is given twice"):
        Mix([OnPolicyKd(), SelfCritical()], 4)
    with pytest.raises(UserError, match="losses: the weight of kd must be positive, got 0"):
        Mix([Kd(weight=0.0)], 4)
    with pytest.raises(UserError, match=r"losses.kd.beta must lie between 0 and 1"):
        Kd(beta=1.5)
    with pytest.raises(UserError, match=r"losses.generation.temperature must be positive"):
        OnPolicyKd(temperature=0)
    with pytest.raises(UserError, match=r"losses.generation.gold_share must lie between"):
        OnPolicyKd(gold_share=2)
    with pytest.raises(UserError, match=r"losses.contrastive.temperature must be positive"):
        InfoNce(temperature=0)
    with pytest.raises(ValueError, match="needs 'gold', which the step did not provide"):
        TeacherForcing()(Evidence())
    with pytest.raises(ValueError, match="needs the teacher's logits"):
        Kd()(Evidence(gold=two_rows()))


# ------------------------------------------------------------------ with a model


IDS = torch.arange(10, 34).view(2, 12)
MASK = torch.arange(12) < torch.tensor([12, 7])[:, None]
ANSWERS = torch.tensor([[40, 41, 2], [42, 2, 0]])
ANSWER_MASK = torch.tensor([[1, 1, 1], [1, 1, 0]])


def situation(folder: Any) -> tuple[Any, CrossAttention, Slots, Evidence]:
    """A model with LoRA, a compressor, and all evidence of a batch of two questions."""
    torch.manual_seed(0)
    model = Backbone(pretrained=str(folder), lora=Lora(r=2, dropout=0.0)).load().eval()
    table = model.get_input_embeddings()
    compressor = CrossAttention(32, embedding_rms(table), slots=4)
    slots = compressor(Source().encode(model, IDS, MASK), MASK, FixedSlots(4))
    ones = torch.ones(2, 2)
    head, tail = tokens(table, torch.tensor([[1, 50]] * 2), ones), tokens(table, torch.tensor([[60, 61]] * 2), ones)
    text = Slots(table(IDS), MASK, {})

    def scored(answers: torch.Tensor, mask: torch.Tensor) -> Predicted:
        answer = tokens(table, answers, mask, predicted=True)
        ours = assemble(head, slots, tail, answer)
        whole = assemble(head, text, tail, answer)
        with torch.no_grad(), model.disable_adapter():
            teacher = predicted(model(**whole.arguments()).logits, whole.labels).logits
        return predicted(model(**ours.arguments()).logits, ours.labels, teacher)

    own = torch.tensor([[40, 44], [45, 2]])
    gold = ANSWERS.masked_fill(ANSWER_MASK == 0, -100)
    evidence = Evidence(
        gold=scored(ANSWERS, ANSWER_MASK),
        own=scored(own, torch.ones(2, 2)),
        agreed=until_first_error(gold, own)[gold != -100],
        advantage=torch.tensor([0.5, -0.5]),
        slots=slots.slots,
        slot_mask=slots.mask,
        reference=torch.randn(2, 32),
        group=torch.tensor([0, 1]),
    )
    return model, compressor, slots, evidence


def test_teacher_forcing_is_the_labels_loss_of_transformers(tiny_folder: Any) -> None:
    model, _, slots, evidence = situation(tiny_folder)
    table = model.get_input_embeddings()
    ones = torch.ones(2, 2)
    head, tail = tokens(table, torch.tensor([[1, 50]] * 2), ones), tokens(table, torch.tensor([[60, 61]] * 2), ones)
    whole = assemble(head, slots, tail, tokens(table, ANSWERS, ANSWER_MASK, predicted=True))
    theirs = model(**whole.arguments(), labels=whole.labels).loss
    ours = TeacherForcing()(evidence)
    assert int(ours.units) == 5
    torch.testing.assert_close(ours.mean, theirs)
    # The logits at prompt - 1 + t predict answer token t.
    row = model(inputs_embeds=torch.cat([head.embeds, slots.slots, tail.embeds, table(ANSWERS)], dim=1)).logits[0]
    torch.testing.assert_close(F.cross_entropy(row[7:-1], ANSWERS[0], reduction="sum"), -_row(evidence, 0))


def _row(evidence: Evidence, row: int) -> torch.Tensor:
    gold = evidence.gold
    assert gold is not None
    return gold.log_probs[gold.row == row].sum()


@pytest.mark.parametrize(
    "term",
    [
        TeacherForcing(),
        Kd(),
        Kd(beta=0.5),
        OnPolicyKd(),
        FirstErrorCe(),
        SelfCritical(),
        OffdiagMargin(margin=-1.0),
        InfoNce(),
    ],
    ids=lambda term: type(term).__name__,
)
def test_every_term_reaches_the_compressor(tiny_folder: Any, term: Any) -> None:
    model, compressor, _, evidence = situation(tiny_folder)
    Mix([term], 32)(evidence, torch.tensor(5)).loss_sum.backward()
    for name, parameter in compressor.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    assert compressor.queries.grad is not None
    assert compressor.queries.grad.abs().max() > 1e-6
    adapters = [p.grad for name, p in model.named_parameters() if ".lora_B" in name]
    # The slots themselves do not come from the adapters, so losses on slots alone do not train them.
    assert all((grad is not None and grad.any()) == ("slots" not in term.needs) for grad in adapters)
    assert all(p.grad is None for name, p in model.named_parameters() if ".lora_" not in name)


def test_a_loss_on_the_answer_alone_would_not_reach_it(tiny_folder: Any) -> None:
    """Scoring a generated answer without its prompt, as a loss, trains no compressor."""
    model, compressor, _, _ = situation(tiny_folder)
    scores = model(torch.tensor([[40, 44]])).logits
    predicted(scores, torch.tensor([[-100, 44]])).log_probs.sum().backward()
    assert all(p.grad is None for p in compressor.parameters())
