"""The AutoCompressor method: what a step computes, what trains, what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from autocompressor_steps import TOKENS, at_step, batch, method, pieces, with_control_tokens
from lightning.pytorch import Trainer
from torch.nn.functional import cross_entropy

import kvc
from kvc.core.backbone import Backbone, Lora
from kvc.core.build import build_model
from kvc.core.export import SCHEMA, write_export
from kvc.data.documents import Documents
from kvc.errors import UserError
from kvc.methods.autocompressor import AutoCompressor
from kvc.methods.autocompressor.cutting import Cutting
from kvc.methods.autocompressor.summaries import Fixed, Variable

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


def test_halves_are_two_segments_of_one_substep(tiny_folder: Path) -> None:
    made = method(tiny_folder, training_substeps=2, segment_lengths=[9, 10]).train()
    data = batch()
    (output,) = pieces(made, {**data, "halves": torch.ones(3, dtype=torch.bool)})
    reading = made.compressor.read(data["input_ids"], data["attention_mask"], segment_lengths=[20, 20])
    loss, count = made.compressor.loss(reading, data["labels"])
    torch.testing.assert_close(output.loss_sum, loss)
    assert int(output.num_tokens) == int(count)


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


@pytest.mark.parametrize("gate", ["after", "before"])
def test_drawn_stops_are_read_as_hard_ones_and_compared(tiny_folder: Path, gate: Any) -> None:
    copies, data = 3, batch()
    made = method(tiny_folder, summary=Variable(2, 0.5, gate=gate), stop_draws=copies).train()
    at_step(made, 0)
    torch.manual_seed(1)
    (output,) = (piece() for piece in made.substeps(data))
    output.loss_sum.backward()
    found = {name: p.grad for name, p in made.named_parameters() if p.grad is not None}
    assert found["summary.controls.eoc_weight"].any()

    torch.manual_seed(1)
    (output_again,) = (piece() for piece in made.substeps(data))
    assert float(output_again.loss_sum) == float(output.loss_sum)
    rows = {key: value.repeat_interleave(copies, 0) for key, value in data.items()}
    torch.manual_seed(1)
    reading = made.compressor.read(
        rows["input_ids"], rows["attention_mask"], segment_lengths=made.eval_lengths(TOKENS), soft=True
    )
    assert [report.chance is not None for report in reading.reports] == [True] * len(reading.reports)
    total, tokens = made.compressor.loss(reading, rows["labels"])
    assert int(output.num_tokens) == int(tokens)
    assert float(output.loss_sum.detach()) == pytest.approx(float(total + reading.penalty * tokens), rel=1e-4)


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
        ({"stop_draws": 1}, "model.stop_draws must be 0, or 2 or more"),
        ({"stop_draws": 2}, "model.stop_draws: has no effect without a summary of variable length"),
        ({"stops_from": 0.5}, "model.stops_from: has no effect without a summary of variable length"),
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
