"""The compressor as a method: what it trains, what its loss is, what its answers are."""

from typing import Any

import pytest
import torch
from squad_tiny import MAKERS, SLOTS, batch, method, squad
from torch.nn import functional as F

from kvc.core.backbone import Backbone, Lora
from kvc.errors import UserError
from kvc.methods.squad import Anchors, FixedRatio, FixedSlots, MeanPool, Source
from kvc.methods.squad.baselines import METHOD
from kvc.methods.squad.losses import FirstErrorCe, InfoNce, Kd, OffdiagMargin, OnPolicyKd, SelfCritical, TeacherForcing
from kvc.methods.squad.reading import Tokens

SAID = ("completion", "kv_tokens_context", "kv_tokens_final")
TIMES = ("seconds", "compress_seconds", "prefill_seconds", "decode_seconds")


def plain(folder: Any) -> Any:
    return Backbone(pretrained=str(folder)).load().eval()


def whole(data: dict[str, Any], row: int, parts: tuple[str, ...] = ("head", "context", "tail")) -> list[int]:
    """The tokens of one row."""
    return [token for part in parts for token in data[f"{part}_ids"][row][data[f"{part}_mask"][row]].tolist()]


def said(model: Any, ids: list[int], count: int = 5) -> list[int]:
    """Greedy continuation, token by token, until EOS."""
    found: list[int] = []
    while len(found) < count and 2 not in found:
        found.append(int(model(torch.tensor([ids + found])).logits[0, -1].argmax()))
    return found


@pytest.mark.parametrize("name", ["mean_pool", "anchors"])
@torch.no_grad()
def test_ratio_one_is_the_plain_model(name: str, tiny_folder: Any) -> None:
    """A slot for every token that says nothing but the token: the answers of the text itself, token for token."""
    settings: dict[str, Any] = {"source": Source("embeddings")} if name == "mean_pool" else {}
    maker: Any = {
        "mean_pool": lambda width, rms: MeanPool(width, rms, project=False, norm=False),
        "anchors": lambda width, rms: Anchors(width, rms, bidirectional=False),
    }[name]
    made = method(tiny_folder, name, noise=0.0, compressor=maker, budget=FixedRatio(1), **settings).eval()
    data = batch(squad(tiny_folder), [0, 1, 2, 3])
    base = plain(tiny_folder)
    loss = 0.0
    for row, record in enumerate(made.records(data)):
        ours, full = record["arms"][METHOD], record["arms"]["full"]
        expected = said(base, whole(data, row))
        assert ours["new_tokens"] == len(expected)
        assert ours["completion"] == full["completion"] == made.tokenizer.decode(expected, skip_special_tokens=True)
        assert ours["kv_tokens_context"] == full["kv_tokens_context"] == record["context_tokens"]
        ids, answer = whole(data, row), whole(data, row, ("answer",))
        logits = base(torch.tensor([ids + answer])).logits[0, len(ids) - 1 : -1]
        loss += float(F.cross_entropy(logits, torch.tensor(answer), reduction="sum"))
    assert float(made.step(data).loss_sum) == pytest.approx(loss, rel=1e-4)


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("scope", ["context", "prompt"])
@torch.no_grad()
def test_a_padded_batch_says_what_its_rows_say(name: str, scope: Any, tiny_folder: Any) -> None:
    if (name, scope) == ("anchors", "prompt"):
        pytest.skip("anchors need a tail")
    made, data = method(tiny_folder, name).eval(), squad(tiny_folder, scope=scope)
    together = made.records(batch(data, [0, 1, 2, 3]))
    losses = 0.0
    for row, record in enumerate(together):
        (alone,) = made.records(batch(data, [row]))
        for arm, found in record["arms"].items():
            for key in found.keys() - set(TIMES):
                assert found[key] == alone["arms"][arm][key], (arm, key)
        losses += float(made.step(batch(data, [row])).loss_sum)
    assert float(made.step(batch(data, [0, 1, 2, 3])).loss_sum) == pytest.approx(losses, rel=1e-4)


@pytest.mark.parametrize("name", MAKERS)
@torch.no_grad()
def test_it_does_not_matter_where_padding_is(name: str, tiny_folder: Any) -> None:
    made, data = method(tiny_folder, name, max_length=12).eval(), batch(squad(tiny_folder), [0, 1, 2, 3])
    left = dict(data)
    for part in ("head", "context", "tail"):
        ids, mask = data[f"{part}_ids"], data[f"{part}_mask"]
        left[f"{part}_ids"] = torch.stack([row.roll(int((~kept).sum())) for row, kept in zip(ids, mask)])
        left[f"{part}_mask"] = mask.flip(1)
    for one, two in zip(made.records(data), made.records(left), strict=True):
        for arm in one["arms"]:
            assert [one["arms"][arm][k] for k in SAID] == [two["arms"][arm][k] for k in SAID], arm
    assert float(made.step(left).loss_sum) == pytest.approx(float(made.step(data).loss_sum), rel=1e-4)


@torch.no_grad()
def test_contexts_are_read_behind_bos(tiny_folder: Any) -> None:
    made, data = method(tiny_folder, source=Source()).eval(), batch(squad(tiny_folder), [0, 1, 2, 3])
    base, found = plain(tiny_folder), made.read(data).reference
    for row in range(4):
        ids = torch.tensor([[1, *whole(data, row, ("context",))]])
        expected = Source().encode(base, ids, torch.ones_like(ids))[0, 1:].mean(0)
        torch.testing.assert_close(found[row], expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_anchors_read_long_contexts_whole_and_so_do_their_baselines(tiny_folder: Any) -> None:
    made, data = method(tiny_folder, "anchors", max_length=8, budget=FixedSlots(3)).eval(), squad(tiny_folder)
    for record in made.records(batch(data, [0, 1, 2, 3])):
        assert record["context_tokens"] > 8
        for arm in (METHOD, "first", "last", "random", "mean_pool"):
            assert record["arms"][arm]["kv_tokens_context"] == 3, arm


@torch.no_grad()
def test_stored_arms_of_another_size_are_measured_anew(tiny_folder: Any) -> None:
    made, data = method(tiny_folder, budget=FixedSlots(7)).eval(), batch(squad(tiny_folder), [0, 1])
    measured = made.records(data)
    for count in (9, 7):
        stored = {**measured[0]["arms"]["first"], "kv_tokens_context": count, "completion": "stored"}
        made.stored.arms = {"first M7": dict.fromkeys(data["id"].tolist(), stored)}
        said = [record["arms"]["first"]["completion"] for record in made.records(data)]
        assert (said == ["stored"] * 2) == (count == 7)
        assert said == ["stored"] * 2 or said == [record["arms"]["first"]["completion"] for record in measured]


@pytest.mark.parametrize("name", SLOTS)
@torch.no_grad()
def test_long_contexts_are_read_in_pieces(name: str, tiny_folder: Any) -> None:
    made, data = method(tiny_folder, name, max_length=12, budget=FixedSlots(3)).eval(), squad(tiny_folder)
    records = made.records(batch(data, [0, 1, 2, 3]))
    pieces = [-(-record["context_tokens"] // 12) for record in records]
    assert len(set(pieces)) > 1
    for count, record in zip(pieces, records):
        for arm in (METHOD, "first", "last", "random", "mean_pool"):
            assert record["arms"][arm]["kv_tokens_context"] == 3 * count


@torch.no_grad()
def test_arms_are_the_frozen_model(tiny_folder: Any) -> None:
    made, data = method(tiny_folder, budget=FixedSlots(7)).eval(), batch(squad(tiny_folder), [0, 1, 2, 3])
    base, tokenizer = plain(tiny_folder), made.tokenizer
    kept: dict[str, Any] = {"first": lambda ids: ids[:7], "last": lambda ids: ids[-7:], "full": lambda ids: ids}
    for row, record in enumerate(made.records(data)):
        head, context, tail = (whole(data, row, (part,)) for part in ("head", "context", "tail"))
        prompts = {arm: head + keep(context) + tail for arm, keep in kept.items()}
        question = tokenizer(data["questions"][row].bare_prompt, add_special_tokens=False)["input_ids"]
        prompts["no_context"] = [1, *question]
        for arm, prompt in prompts.items():
            found, expected = record["arms"][arm], said(base, prompt)
            assert found["completion"] == tokenizer.decode(expected, skip_special_tokens=True), arm
            assert found["kv_tokens_final"] == len(prompt) + len(expected) - 1
            assert found["kv_bytes_final"] == found["kv_tokens_final"] * 2 * 2 * 2 * 8 * 4
        assert record["arms"]["random"]["kv_tokens_context"] == 7
        first = [record["arms"][arm]["completion"] for arm in ("random", "first")]
        assert all(isinstance(text, str) for text in first)
    again = method(tiny_folder, budget=FixedSlots(7)).eval().records(data)
    assert [r["arms"]["random"]["completion"] for r in again] == [
        r["arms"]["random"]["completion"] for r in made.records(data)
    ]


@pytest.mark.parametrize("mode", ["full_text", "no_context"])
@torch.no_grad()
def test_controls_read_the_text_or_nothing(mode: Any, tiny_folder: Any) -> None:
    made, data = method(tiny_folder, mode=mode).eval(), batch(squad(tiny_folder), [0, 1])
    for row, record in enumerate(made.records(data)):
        prompt = whole(data, row)
        if mode == "no_context":
            prompt = [1, *made.tokenizer(data["questions"][row].bare_prompt, add_special_tokens=False)["input_ids"]]
        expected = said(made.backbone, prompt)
        assert record["completion"] == made.tokenizer.decode(expected, skip_special_tokens=True)
        assert set(record["arms"]) == {METHOD, "full", "no_context"}
    assert set(made.groups()) == {"lora"}


TERMS = {
    "teacher_forcing": [TeacherForcing()],
    "kd": [Kd()],
    "onpolicy_kd": [OnPolicyKd(gold_share=0.0)],
    "first_error_ce": [FirstErrorCe()],
    "self_critical": [SelfCritical()],
    "offdiag_margin": [OffdiagMargin(margin=-1.0)],
    "infonce": [InfoNce()],
    "brief": [TeacherForcing(0.5), OnPolicyKd(0.3), OffdiagMargin(0.2)],
}


@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("bf16", [False, True])
def test_every_loss_trains_the_compressor(terms: str, bf16: bool, tiny_folder: Any, monkeypatch: Any) -> None:
    made, data = method(tiny_folder, losses=TERMS[terms]), batch(squad(tiny_folder), [0, 1, 2, 3], "train")
    if terms == "self_critical":
        # Answers of a random model are worth nothing, so that there is nothing to learn.
        monkeypatch.setattr(made, "rewards", lambda batch, ids: ids[:, 0].float())
    made.train()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        output = made.step(data)
    output.loss_sum.backward()
    assert made.training
    assert made.backbone.training
    assert made.compressor is not None
    grads = [p.grad for p in made.compressor.parameters()]
    assert all(grad is not None and grad.isfinite().all() and grad.any() for grad in grads)
    lora = [p.grad for name, p in made.named_parameters() if ".lora_" in name]
    assert any(grad is not None and grad.any() for grad in lora)
    assert {term.name for term in TERMS[terms]} <= output.metrics.keys()
    assert {"slot_cosine", "slot_rms", "uniformity", "alignment"} <= output.metrics.keys()


@torch.no_grad()
def test_validation_measures_the_cross_entropy_whatever_is_trained(tiny_folder: Any) -> None:
    data = batch(squad(tiny_folder), [0, 1])
    one, other = (method(tiny_folder, losses=losses).eval() for losses in ([TeacherForcing()], [Kd(weight=3.0)]))
    assert torch.equal(one.step(data).loss_sum, other.step(data).loss_sum)


@pytest.mark.parametrize("name", MAKERS)
def test_the_teacher_reads_the_text_with_the_frozen_model(name: str, tiny_folder: Any) -> None:
    made, data = method(tiny_folder, name), batch(squad(tiny_folder), [0, 1], "train")
    logits = made.train().taught(data, Tokens.of(data, "answer"))
    base, expected = plain(tiny_folder), []
    for row in (0, 1):
        ids, answer = whole(data, row), whole(data, row, ("answer",))
        with torch.no_grad():
            expected.append(base(torch.tensor([ids + answer])).logits[0, len(ids) - 1 : -1])
    torch.testing.assert_close(logits, torch.cat(expected), atol=1e-4, rtol=1e-4)
    assert not logits.requires_grad
    assert made.backbone.training


def test_another_model_may_teach(tiny_folder: Any) -> None:
    from kvc.methods.squad import ContextCompressor

    teacher = Backbone(pretrained=str(tiny_folder), from_config=True)
    made = ContextCompressor(Backbone(pretrained=str(tiny_folder), lora=Lora(r=2)), teacher=teacher)
    data = batch(squad(tiny_folder), [0, 1], "train")
    assert made.teacher is None
    made.load_teacher()
    made.train()
    assert made.teacher is not None
    assert not made.teacher.training
    ours = made.taught(data, Tokens.of(data, "answer"))
    made.teacher = None
    assert not torch.allclose(ours, made.taught(data, Tokens.of(data, "answer")))
    assert not any(name.startswith("teacher") for name in made.trained_state())


@pytest.mark.parametrize("name", MAKERS)
def test_what_is_trained_and_in_which_group(name: str, tiny_folder: Any) -> None:
    made = method(tiny_folder, name)
    groups = {key: len(parameters) for key, parameters in made.groups().items()}
    queries = {"cross_attention": 1, "pooling": 1, "latent": 2}
    assert groups.get("queries", 0) == queries.get(name, 0)
    assert groups["lora"] == 2 * 2 * 4
    assert set(groups) - {"queries"} == {"lora", "compressor"}
    assert made.sizes()["compressor_parameters"] == sum(p.numel() for p in made.compressor.parameters())
    assert made.sizes()["lora_parameters"] == sum(p.numel() for p in made.groups()["lora"])
    sizes = made.sizes()
    assert sizes["trainable_parameters"] == sizes["compressor_parameters"] + sizes["lora_parameters"]


def test_a_frozen_decoder_trains_the_reader_alone(tiny_folder: Any) -> None:
    for name in ("anchors", "mean_pool"):
        made, data = method(tiny_folder, name, frozen_decoder=True), batch(squad(tiny_folder), [0, 1], "train")
        adapted = method(tiny_folder, name)
        assert float(made.eval().step(data).loss_sum) != pytest.approx(float(adapted.eval().step(data).loss_sum))
        made.train().step(data).loss_sum.backward()
        keys = [p.grad for key, p in made.named_parameters() if ".lora_A" in key and ".k_proj" in key]
        assert all(grad is not None and grad.any() for grad in keys)


@pytest.mark.parametrize("name", SLOTS)
def test_checkpointing_gives_the_same_gradients(name: str, tiny_folder: Any) -> None:
    found = []
    for checkpointing in (False, True):
        made = method(tiny_folder, name, backbone={"gradient_checkpointing": checkpointing}).train()
        made.step(batch(squad(tiny_folder), [0, 1], "train")).loss_sum.backward()
        found.append({key: p.grad for key, p in made.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for key, gradient in found[0].items():
        torch.testing.assert_close(found[1][key], gradient, atol=1e-4, rtol=1e-3)


def test_training_may_have_a_budget_of_its_own(tiny_folder: Any) -> None:
    made = method(tiny_folder, budget=FixedSlots(3), train_budget=FixedSlots(5))
    data = batch(squad(tiny_folder), [0, 1], "train")
    assert made.train().read(data).counts.tolist() == [5, 5]
    assert made.eval().read(data).counts.tolist() == [3, 3]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "full_text", "lora": None}, "model.backbone.lora: the control 'full_text' trains a LoRA"),
        ({"mode": "full_text", "source": Source()}, "model.source: has no effect with model.mode full_text"),
        ({"mode": "no_context", "losses": [Kd()]}, "model.losses: the control 'no_context' learns from answers"),
        ({"mode": "full_text", "losses": [InfoNce()]}, "model.losses: a contrastive term needs slots"),
        ({"mode": "full_text", "positions": "spread"}, "model.positions: has no effect with model.mode full_text"),
        ({"lora": None, "source": Source(frozen=False)}, "model.backbone.lora: a source that is not frozen trains"),
        ({"source": Source("embeddings", frozen=False)}, "model.source.frozen: embeddings are never trained"),
        ({"source": Source("hidden:9")}, "source.states: hidden:9, but the model has 2 layers"),
        ({"name": "anchors", "source": Source()}, "model.source: has no effect with anchors"),
        ({"name": "anchors", "positions": "spread"}, "model.positions: has no effect with anchors"),
        ({"name": "anchors", "lora": None}, "model.backbone.lora: anchors need a LoRA"),
        ({"name": "anchors", "losses": [InfoNce()]}, "model.losses: a contrastive term needs slots"),
        ({"name": "anchors", "backbone": {"gradient_checkpointing": True}}, "anchors are keys and values"),
        ({"frozen_decoder": True, "source": Source()}, "model.frozen_decoder: nothing would train the LoRA"),
        ({"frozen_decoder": True, "backbone": {"gradient_checkpointing": True}}, "does not go together"),
        ({"losses": [TeacherForcing()], "teacher": True}, "model.teacher: has no effect"),
    ],
)
def test_settings_that_do_not_fit(settings: dict[str, Any], message: str, tiny_folder: Any) -> None:
    if settings.get("teacher"):
        settings = {**settings, "teacher": Backbone(pretrained=str(tiny_folder))}
    with pytest.raises(UserError, match=message):
        method(tiny_folder, **settings)


def test_more_slots_than_tokens_where_that_is_forbidden(tiny_folder: Any) -> None:
    made = method(tiny_folder, budget=FixedSlots(64, "refuse"), max_length=96).eval()
    with pytest.raises(UserError, match=r"budget.slots: 64 slots are more than the .* tokens of a text"):
        made.records(batch(squad(tiny_folder), [0, 1]))
