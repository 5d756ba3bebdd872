"""The AutoCompressor method: what a step computes, what trains, what an evaluation says, what is refused."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch.nn.functional import cross_entropy

import kvc
from kvc.core.backbone import Backbone, Lora
from kvc.core.build import build_model
from kvc.core.export import SCHEMA, write_export
from kvc.core.method import StepOutput
from kvc.data.documents import Documents
from kvc.errors import UserError
from kvc.methods.autocompressor import AutoCompressor
from kvc.methods.autocompressor.cutting import Cutting
from kvc.methods.autocompressor.evaluation import Arm, arms_of
from kvc.methods.autocompressor.scoring import summarize
from kvc.methods.autocompressor.summaries import Fixed, Variable

TOKENS = 40


def method(tiny_folder: Path, lora: bool = False, **settings: Any) -> AutoCompressor:
    backbone = Backbone(pretrained=str(tiny_folder), lora=Lora(r=2, dropout=0.0) if lora else None)
    settings.setdefault("summary", Fixed(3) if settings.get("mode", "compress") == "compress" else None)
    made = AutoCompressor(backbone, **settings)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in made.named_parameters():
        if ".lora_B." in name or name.startswith("summary."):
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    return made


def batch(rows: int = 3, ragged: bool = True) -> dict[str, torch.Tensor]:
    """Right-padded; padding holds ordinary ids, so that a leak shows."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, 1200, (rows, TOKENS), generator=generator)
    lengths = torch.tensor([TOKENS, 35, 21][:rows]) if ragged else torch.full((rows,), TOKENS)
    mask = (torch.arange(TOKENS) < lengths[:, None]).long()
    return {
        "id": torch.arange(rows),
        "input_ids": ids,
        "attention_mask": mask,
        "labels": ids.masked_fill(mask == 0, -100),
        "answer": torch.arange(TOKENS).expand(rows, -1) % 7 == 0,
        "fact": torch.arange(TOKENS).expand(rows, -1) % 5 == 0,
    }


def at_step(made: AutoCompressor, step: int = 0) -> AutoCompressor:
    """As if a trainer ran it."""
    made._trainer = SimpleNamespace(global_step=step)  # type: ignore[assignment]
    return made


def with_control_tokens(source: Path, folder: Path) -> Path:
    """A base model whose tokenizer has `<sum>` and `<eoc>`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(source)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<sum>", "<eoc>"]})
    model = AutoModelForCausalLM.from_pretrained(source)
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def pieces(made: AutoCompressor, data: Any, step: int = 0) -> list[StepOutput]:
    return [piece() for piece in at_step(made, step).substeps(data)]


# ---------------------------------------------------------------------- training


@pytest.mark.parametrize("summary", [Fixed(3), Variable(2, 0.5)])
def test_a_step_is_the_loss_of_reading_segment_by_segment(tiny_folder: Path, summary: Any) -> None:
    made = method(tiny_folder, summary=summary, training_substeps=2, segment_lengths=[9, 10]).train()
    data = batch()
    found = pieces(made, data)
    for output, start in zip(found, (2, 21)):
        total, penalties = 0.0, []
        prompt = None if start == 2 else prompt  # noqa: F821
        hidden = []
        for length in (9, 10):
            part = slice(start, start + length)
            start += length
            last = start == TOKENS
            reading = made.compressor.read(
                data["input_ids"][:, part],
                data["attention_mask"][:, part],
                softprompt=prompt,
                output_softprompt=not last,
            )
            prompt = reading.prompt
            hidden.append(reading.hidden)
            penalties += [report.penalty[report.active] for report in reading.reports]
        logits = made.backbone.get_output_embeddings()(torch.cat(hidden, dim=1))
        labels = data["labels"][:, start - 19 : start]
        total = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
        tokens = int((labels[:, 1:] != -100).sum())
        penalty = torch.cat(penalties).mean() if penalties else torch.zeros(())
        assert int(output.num_tokens) == tokens
        assert float(output.loss_sum) == pytest.approx(float(total + penalty * tokens), rel=1e-4)


def test_published_weighting_adds_up_the_means_of_substeps(tiny_folder: Path) -> None:
    made = {
        kind: method(tiny_folder, training_substeps=2, substep_loss=kind).train()  # type: ignore[arg-type]
        for kind in ("tokens", "mean")
    }
    tokens, mean = (pieces(made[kind], batch()) for kind in ("tokens", "mean"))
    assert sum(float(output.num_tokens) for output in mean) == pytest.approx(1)
    for one, two in zip(tokens, mean):
        assert float(two.loss_sum) == pytest.approx(float(one.loss_sum / one.num_tokens), rel=1e-5)
    # An evaluation says the loss per token either way.
    steps = [model.eval().step(batch()) for model in made.values()]
    assert float(steps[0].loss_sum) == pytest.approx(float(steps[1].loss_sum))


def gradients(made: AutoCompressor, data: Any) -> dict[str, torch.Tensor]:
    made.zero_grad()
    for output in pieces(made, data):
        output.loss_sum.backward()
    return {name: p.grad.clone() for name, p in made.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("summary", [Fixed(3), Variable(2, 0.5), Variable(2, gate="log")])
def test_checkpointing_gives_the_same_gradients(tiny_folder: Path, summary: Any) -> None:
    settings: dict[str, Any] = {"summary": summary, "training_substeps": 2, "randomize_substeps": True}
    plain = gradients(method(tiny_folder, **settings).train(), batch())
    saved = gradients(method(tiny_folder, segment_gradient_checkpointing=True, **settings).train(), batch())
    assert plain.keys() == saved.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(saved[name], gradient, atol=1e-5, rtol=1e-4)


def test_gradients_of_rows_add_up(tiny_folder: Path) -> None:
    made = method(tiny_folder, training_substeps=2, randomize_substeps=True).train()
    data = batch()
    whole = gradients(made, data)
    rows = [gradients(made, {key: value[row : row + 1] for key, value in data.items()}) for row in range(3)]
    for name, gradient in whole.items():
        torch.testing.assert_close(sum(row[name] for row in rows), gradient, atol=2e-5, rtol=1e-3)


def test_only_numbers_pass_between_substeps(tiny_folder: Path) -> None:
    """The second substep depends on the first one's text, and sends no gradient into it."""
    made = method(tiny_folder, training_substeps=2).train()
    data, other = batch(), batch()
    other["input_ids"] = other["input_ids"].clone()
    other["input_ids"][:, :10] += 1
    assert float(pieces(made, data)[1].loss_sum) != float(pieces(made, other)[1].loss_sum)
    first, second = at_step(made).substeps(data)
    first()
    embeddings = made.backbone.get_input_embeddings().weight
    first_ids, second_ids = (set(part.unique().tolist()) for part in data["input_ids"].split(20, dim=1))
    only_first = sorted(first_ids - second_ids)
    inside = torch.autograd.grad(second().loss_sum, embeddings)[0]
    # Tied: the LM head gives every row a gradient, the same whether the first substep's graph is there or not.
    first, second = at_step(made).substeps(data)
    with torch.no_grad():
        first()
    assert torch.equal(inside[only_first], torch.autograd.grad(second().loss_sum, embeddings)[0][only_first])


def test_random_lengths_depend_on_the_step_alone(tiny_folder: Path) -> None:
    made = method(tiny_folder, training_substeps=2, segments_per_substep=3, randomize_substeps=True)
    seen: list[list[int]] = []

    def lengths(step: int) -> list[list[int]]:
        seen.clear()
        read = made.compressor.read

        def spy(*args: Any, **kwargs: Any) -> Any:
            seen.append(kwargs["segment_lengths"])
            return read(*args, **kwargs)

        made.compressor.read = spy  # type: ignore[method-assign]
        pieces(made, batch(), step)
        made.compressor.read = read  # type: ignore[method-assign]
        return list(seen)

    first = lengths(0)
    torch.rand(3)
    assert lengths(0) == first
    assert any(lengths(step) != first for step in range(1, 4))
    assert all(sum(part) == 20 and len(part) == 3 for part in first)
    assert made.eval_lengths(TOKENS) == [6, 7, 7, 6, 7, 7]


@pytest.mark.parametrize("lora", [True, False])
def test_what_trains(tiny_folder: Path, lora: bool) -> None:
    made = method(tiny_folder, lora=lora)
    names = {name for name, p in made.named_parameters() if p.requires_grad}
    assert "summary.embed_summary.weight" in names
    assert all(".lora_" in n or n.startswith("summary.") for n in names) == lora
    assert set(made.groups()) == {"summary", "lora" if lora else "model"}
    assert all(gradient.any() for gradient in gradients(made.train(), batch()).values())
    variable = method(tiny_folder, lora=lora, summary=Variable(2)).groups()
    assert set(variable) == {"summary", "stop", "lora" if lora else "model"}
    assert len(variable["stop"]) == 2
    control = method(tiny_folder, lora=lora, summary=Fixed(0))
    assert set(control.groups()) == {"lora" if lora else "model"}


def test_training_goes_on_from_an_autocompressor(tiny_folder: Path, tmp_path: Path) -> None:
    first = method(tiny_folder, segment_gradient_checkpointing=True)
    first.as_model().save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["segment_gradient_checkpointing"] is True
    first.tokenizer.save_pretrained(tmp_path)
    again = AutoCompressor(Backbone(pretrained=str(tmp_path)), Fixed(3))
    assert torch.equal(again.summary.embed_summary.weight, first.summary.embed_summary.weight)  # type: ignore[union-attr]
    AutoCompressor(Backbone(pretrained=str(tmp_path)), Fixed(0))
    with pytest.raises(UserError, match=r"summary_length: .* is an AutoCompressor with 3 summary tokens, not 4"):
        AutoCompressor(Backbone(pretrained=str(tmp_path)), Fixed(4))


@pytest.mark.parametrize("lora", [True, False])
def test_tokens_of_the_vocabulary_train(tiny_folder: Path, tmp_path: Path, lora: bool) -> None:
    folder = with_control_tokens(tiny_folder, tmp_path / "base")
    summary = Variable(2, control_tokens="vocabulary", insertion="overwrite")
    made = method(folder, lora, summary=summary, training_substeps=2).train()
    named = {name for name, p in made.named_parameters() if p.requires_grad and name.startswith("summary.")}
    rows = {"summary.controls.sum_row", "summary.controls.eoc_row"}
    assert named == (rows if lora else set())
    assert rows <= made.trained_state().keys() or not lora
    for piece in pieces(made, batch()):
        piece.loss_sum.backward()
    for name, p in made.named_parameters():
        if name in named:
            assert p.grad is not None
            assert p.grad.any()


def test_the_loss_of_the_text_trains_the_stopping(tiny_folder: Path) -> None:
    found = gradients(method(tiny_folder, lora=True, summary=Variable(2)).train(), batch())
    assert {name for name, gradient in found.items() if name.startswith("summary.") and gradient.any()} == {
        "summary.controls.sum_embedding",
        "summary.controls.eoc_weight",
        "summary.controls.eoc_bias",
    }


@pytest.mark.parametrize("gate", ["after", "log"])
def test_stops_may_be_trained_later(tiny_folder: Path, gate: Any) -> None:
    def trained(weight: float, step: int, start: float) -> tuple[float, dict[str, torch.Tensor]]:
        made = method(tiny_folder, summary=Variable(2, weight, gate=gate), stops_from=start).train()
        at_step(made, step).trainer.estimated_stepping_batches = 40
        (output,) = (piece() for piece in made.substeps(batch()))
        output.loss_sum.backward()
        found = {name: p.grad for name, p in made.named_parameters() if p.grad is not None}
        return float((output.loss_sum / output.num_tokens).detach()), found

    stop = {"summary.controls.eoc_weight", "summary.controls.eoc_bias"}
    nothing, _ = trained(0.0, 0, 0.0)
    whole, paid = trained(3.0, 0, 0.0)
    early, free = trained(3.0, 19, 0.5)
    assert whole - nothing > 0.1
    assert early == pytest.approx(nothing)
    assert {name for name, gradient in free.items() if not gradient.any()} == stop
    late, found = trained(3.0, 20, 0.5)
    assert late == pytest.approx(whole)
    assert found.keys() == paid.keys()
    for name, gradient in paid.items():
        torch.testing.assert_close(found[name], gradient)


def test_full_attention_is_the_plain_model(tiny_folder: Path) -> None:
    made = method(tiny_folder, mode="full_attention").eval()
    data = batch(ragged=False)
    loss = made.backbone(data["input_ids"], labels=data["labels"]).loss
    (output,) = pieces(made, data)
    assert float(output.loss_sum / output.num_tokens) == pytest.approx(float(loss), rel=1e-5)
    assert set(made.groups()) == {"model"}


# ---------------------------------------------------------------------- settings


def test_defaults_are_those_of_the_brief() -> None:
    import inspect

    expected = {
        "training_substeps": 1,
        "randomize_substeps": False,
        "segments_per_substep": 2,
        "segment_gradient_checkpointing": False,
        "truncate_bptt_segments": 1,
    }
    found = {name: p.default for name, p in inspect.signature(AutoCompressor).parameters.items()}
    assert {name: found[name] for name in expected} == expected
    assert list(found["segment_lengths"]) == []
    variable = Variable()
    assert (variable.compression_max_len, variable.compression_lambda, variable.compression_alpha) == (8, 0.0, 1.0)
    assert variable.compress_stop_threshold is None
    assert Fixed().accumulate_summary
    lora = Lora(r=16, alpha=16, dropout=0.05)
    assert sorted(lora.targets) == ["k_proj", "o_proj", "q_proj", "v_proj"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"training_substeps": 0}, "model.training_substeps must be at least 1"),
        ({"segments_per_substep": 1}, "nothing trains the summary of a single segment"),
        ({"segment_lengths": [5]}, "nothing trains the summary of a single segment"),
        ({"segment_lengths": [5, 0]}, "model.segment_lengths must be positive"),
        ({"segment_lengths": [5, 5], "randomize_substeps": True}, "no effect with randomize_substeps"),
        ({"min_segment_length": 4}, "no effect without randomize_substeps"),
        ({"mode": "full_attention", "summary": Fixed(3)}, "no effect with model.mode full_attention"),
        ({"summary": Variable(control_tokens="vocabulary")}, "the tokenizer has no token <sum>"),
        ({"summary": Variable(stop_mode="threshold")}, "compress_stop_threshold: needed by"),
        ({"stops_from": 2}, "model.stops_from must be a share from 0 to below 1"),
        ({"truncate_bptt_segments": 0}, "truncate_bptt_segments: must be at least 1"),
    ],
)
def test_settings_that_cannot_be_are_refused(tiny_folder: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        method(tiny_folder, **settings)


@pytest.mark.parametrize(
    "cutting",
    [Cutting(2, 2, [50, 60], False, 512), Cutting(20, 4, [], False, 512), Cutting(2, 2, [], True, 512, 60)],
)
def test_a_block_that_is_too_short_is_refused(cutting: Cutting) -> None:
    with pytest.raises(UserError, match=r"data.block_size|cannot be cut"):
        cutting.substeps(219, torch.Generator())


def test_a_block_that_is_too_short_is_refused_before_training(tiny_folder: Path) -> None:
    made = method(tiny_folder, segment_lengths=[200, 200])
    trainer = Trainer(accelerator="cpu", max_steps=1, logger=False, enable_checkpointing=False, barebones=True)
    with pytest.raises(UserError, match=r"data.block_size: 300 tokens are fewer than the 400"):
        trainer.fit(made, Documents(block_size=300, closing=40, counts=(4, 1, 1)))
    with pytest.raises(UserError, match=r"data.block_size: 64 tokens are fewer than the 400"):
        trainer.fit(made, Documents(block_size=512, lessons=0.5, counts=(400, 1, 1)))


# ---------------------------------------------------------------------- evaluation


def plain_nll(model: Any, row: dict[str, torch.Tensor], start: int, stop: int) -> torch.Tensor:
    """Loss of tokens `start + 1` to `stop` of a row that is read from `start` on."""
    ids = row["input_ids"][None, start:stop]
    return cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="none")


@torch.no_grad()
def test_arms_are_what_they_are_called(tiny_folder: Path) -> None:
    made = method(tiny_folder, segment_lengths=[12, 9, 10]).eval()
    data = batch()
    base = Backbone(pretrained=str(tiny_folder)).load().eval()
    with torch.no_grad():
        for parameter in made.backbone.parameters():
            parameter.mul_(1.1)
    for row, record in enumerate(made.records(data)):
        arms = record["arms"]
        assert list(arms) == ["method", "no_context", "full", "after_1", "base_no_context", "base_full"]
        stop = int(data["attention_mask"][row].sum())
        own = {key: value[row] for key, value in data.items()}
        for model, prefix in ((made.backbone, ""), (base, "base_")):
            for arm, start in ((f"{prefix}no_context", 30), (f"{prefix}full", 9)):
                nll = plain_nll(model, own, start, max(stop, 30))[30 - start :] if stop > 30 else torch.zeros(0)
                assert arms[arm]["nll"] == pytest.approx(float(nll.sum()), rel=1e-4, abs=1e-6)
                assert arms[arm]["tokens"] == max(stop - 31, 0)
                answers = own["answer"][31:stop]
                assert arms[arm]["answer_nll"] == pytest.approx(float(nll[answers].sum()), rel=1e-4, abs=1e-6)
                assert arms[arm]["answer_tokens"] == int(answers.sum())
        whole = made.compressor.read(
            data["input_ids"][row : row + 1, 9:stop], segment_lengths=[12, 9, stop - 30] if stop > 30 else [12]
        )
        if stop > 30:
            logits = made.compressor.logits(whole.hidden)[0, 21:-1]
            nll = cross_entropy(logits, own["input_ids"][31:stop], reduction="sum")
            assert arms["method"]["nll"] == pytest.approx(float(nll), rel=1e-4)
            one = made.compressor.read(data["input_ids"][row : row + 1, 21:stop], segment_lengths=[9, stop - 30])
            nll = cross_entropy(made.compressor.logits(one.hidden)[0, 9:-1], own["input_ids"][31:stop], reduction="sum")
            assert arms["after_1"]["nll"] == pytest.approx(float(nll), rel=1e-4)
        assert record["loss"] == pytest.approx(arms["method"]["nll"] / max(arms["method"]["tokens"], 1))


@torch.no_grad()
def test_rows_of_kv(tiny_folder: Path) -> None:
    """Two segments of 12 and 9 tokens with 3 vectors each, a last one of 10."""
    data = batch(1)
    for accumulate, share, peak, final in ((True, 6, 9 + 3 + 3, 16), (False, 3, 12 + 3, 13)):
        made = method(tiny_folder, summary=Fixed(3, accumulate), segment_lengths=[12, 9, 10]).eval()
        (record,) = made.records(data)
        arms = record["arms"]
        assert [segment["vectors"] for segment in record["segments"]] == [3, 3]
        assert [segment["facts"] for segment in record["segments"]] == [3, 1]
        assert arms["method"]["kv_share"] == pytest.approx(share / 21)
        assert arms["method"]["kv_tokens_peak"] == max(peak, final)
        assert (arms["method"]["kv_tokens_final"], arms["full"]["kv_tokens_peak"], arms["full"]["kv_share"]) == (
            final,
            31,
            1.0,
        )
        # Keys and values, 2 layers, 2 KV heads of 8, float32.
        assert arms["method"]["kv_bytes_final"] == final * 2 * 2 * 2 * 8 * 4
        assert (arms["no_context"]["kv_tokens_peak"], arms["no_context"]["kv_share"]) == (10, 0.0)


@pytest.mark.parametrize(
    "summary",
    [Fixed(3), Variable(3), Variable(3, gate="log", compress_stop_threshold=0.1), Variable(3, stop_mode="sample")],
)
@torch.no_grad()
def test_records_of_a_batch_are_those_of_its_rows(tiny_folder: Path, summary: Any) -> None:
    made = method(tiny_folder, lora=True, summary=summary, segments_per_substep=3).eval()
    data = batch()
    for row, record in enumerate(made.records(data)):
        (alone,) = made.records({key: value[row : row + 1] for key, value in data.items()})
        assert alone["segments"] == record["segments"]
        for arm, scores in record["arms"].items():
            assert scores == pytest.approx(alone["arms"][arm], rel=1e-3, abs=1e-5), arm


def test_the_full_text_is_read_where_it_fits_the_table_of_positions(tmp_path: Path, tiny_folder: Path) -> None:
    from transformers import AutoTokenizer, OPTConfig, OPTForCausalLM

    config = OPTConfig(
        vocab_size=1536,
        hidden_size=16,
        word_embed_proj_dim=16,
        ffn_dim=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
    )
    OPTForCausalLM(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(tmp_path)
    with torch.no_grad():
        (short,) = method(tmp_path).eval().records(batch(1))
        (extended,) = method(tmp_path, max_position_embeddings=TOKENS).eval().records(batch(1))
    assert list(short["arms"]) == ["method", "no_context", "base_no_context"]
    assert list(extended["arms"]) == ["method", "no_context", "full", "base_no_context", "base_full"]
    assert short["arms"]["method"] == pytest.approx(extended["arms"]["method"])
    with pytest.raises(UserError, match="max_position_embeddings"):
        method(tiny_folder, max_position_embeddings=1000)


def test_controls_have_the_arms_that_make_sense() -> None:
    full = arms_of([5, 5, 5], True, False, False)
    assert list(full) == [
        "method",
        "no_context",
        "base_no_context",
        "base_full",
    ]
    assert list(arms_of([5, 5, 5], False, False, False))[:2] == ["method", "full"]
    assert list(arms_of([5, 5, 5], False, True, True))[:5] == ["method", "no_context", "full", "after_1", "soft"]
    assert full["method"] == Arm(2, full=True)


def scores(nll: float, tokens: int = 10, vectors: int = 2, facts: int = 1) -> dict[str, Any]:
    return {
        "nll": nll,
        "right": 4,
        "tokens": tokens,
        "answer_nll": nll / 2,
        "answer_right": 1,
        "answer_tokens": 3,
        "kv_share": 0.1,
        "kv_tokens_peak": 20,
        "kv_tokens_final": 12,
    }


def test_a_summary_weighs_tokens_and_pairs_blocks() -> None:
    records = [
        {
            "id": row,
            "segments": [{"tokens": 9, "vectors": 1 + row % 3, "facts": 2 * (row % 3)}],
            "arms": {
                "method": scores(20 + row, 10 + row),
                "no_context": scores(30 + 2 * row, 10 + row),
                "full": scores(10, 10 + row),
            },
        }
        for row in range(8)
    ]
    summary = summarize(records, 0)
    tokens = sum(10 + row for row in range(8))
    none, ours, full = (
        sum(map(nll, range(8))) / tokens for nll in (lambda r: 30 + 2 * r, lambda r: 20 + r, lambda r: 10)
    )
    assert summary.metrics["loss"].value == pytest.approx(ours)
    assert summary.metrics["perplexity"].value == pytest.approx(2.718281828**ours, rel=1e-6)
    assert summary.differences["loss"]["no_context"].value == pytest.approx(ours - none)
    assert summary.differences["loss"]["no_context"].high < 0
    assert summary.metrics["recovered"].value == pytest.approx((none - ours) / (none - full))
    assert summary.metrics["answer_recovered"].value == pytest.approx((none - ours) / (none - full))
    assert summary.metrics["facts_vectors_correlation"].value == pytest.approx(1)
    for record in records:
        record["arms"]["full"] = scores(60, 10)
        record["segments"] = []
    without = summarize(records, 0).metrics
    assert not {"recovered", "vectors", "facts_vectors_correlation"} & without.keys()


# ---------------------------------------------------------------------- what leaves


@pytest.mark.parametrize("lora", [True, False])
@torch.no_grad()
def test_an_export_says_the_same(lora: bool, tiny_folder: Path, tmp_path: Path) -> None:
    model = {
        "class_path": "kvc.methods.autocompressor.AutoCompressor",
        "init_args": {
            "backbone": {"pretrained": str(tiny_folder), "lora": {"r": 2} if lora else None},
            "summary": {
                "class_path": "kvc.methods.autocompressor.summaries.Fixed",
                "init_args": {"summary_length": 3},
            },
        },
    }
    made: Any = build_model(model)
    for parameter in made.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn_like(parameter) * 0.05)
    manifest = {"schema": SCHEMA, "model": model, "base_model": made.base_identity()}
    write_export(made, tmp_path / "out", manifest, "card")
    loaded: Any = kvc.load(tmp_path / "out")
    one, two = made.eval().records(batch())[0], loaded.records(batch())[0]
    assert one["arms"]["method"] == pytest.approx(two["arms"]["method"], rel=1e-5)
