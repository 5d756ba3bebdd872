"""AutoCompressors against numbers of the original: one test per case file, whatever its name.

The set beside this file ships; `--reference DIR` runs over all of `DIR/autocompressor`.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from autocompressor_cases import Case, case_files, gradients_of, kind_of
from safetensors.torch import load_file

from kvc.methods.autocompressor import AutoCompressorModel
from kvc.methods.autocompressor.controls import TableControls
from kvc.methods.autocompressor.metrics import segment_scores
from kvc.methods.autocompressor.rolling import generate_segments
from kvc.methods.autocompressor.segments import random_segment_lengths
from kvc.methods.autocompressor.softprompt import SoftPrompt
from kvc.methods.autocompressor.substeps import fixed_substeps, substep_readings
from kvc.methods.autocompressor.variable import VariableSummary

NEAR: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5}
LOSS: dict[str, Any] = {"rtol": 0, "atol": 1e-5}
GRADIENT: dict[str, Any] = {"rtol": 1e-3, "atol": 1e-5}
KINDS = (
    "forward",
    "two_calls",
    "training",
    "substeps",
    "metrics",
    "generation",
    "decoding",
    "soft",
    "hard",
    "insertion",
)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    folder = metafunc.config.getoption("--reference") / "autocompressor"
    if "hub" in metafunc.fixturenames:
        paths = sorted(folder.glob("hub_layout_*"))
        metafunc.parametrize("hub", paths, ids=lambda path: path.name)
    wanted = [kind for kind in KINDS if f"{kind}_case" in metafunc.fixturenames]
    for kind in wanted:
        paths = [path for path in case_files(folder) if kind_of(path) == kind]
        metafunc.parametrize(f"{kind}_case", paths, ids=lambda path: f"{path.parent.name}-{path.stem}")


def test_the_reference_holds_cases(reference: Path) -> None:
    found = {kind_of(path) for path in case_files(reference / "autocompressor")}
    assert {"forward", "two_calls", "training", "metrics", "generation", "decoding", "hard"} <= found


def near(found: torch.Tensor, expected: torch.Tensor, how: dict[str, Any] = NEAR, name: str = "") -> None:
    torch.testing.assert_close(found, expected, **how, msg=lambda text: f"{name}: {text}")


def check_gradients(case: Case, model: AutoCompressorModel) -> None:
    found, expected = gradients_of(model), case.gradients
    assert found.keys() - {"lm_head.weight"} == expected.keys() - {"lm_head.weight"}
    for name, gradient in expected.items():
        near(found[name], gradient, GRADIENT, name)


@torch.no_grad()
def test_forward(forward_case: Path) -> None:
    case = Case.read(forward_case)
    model, tensors = case.model(), case.tensors
    ids, mask = tensors["input_ids"], tensors.get("attention_mask")
    rows: list[torch.Tensor] = []
    table = getattr(model.backbone.get_decoder(), "embed_positions", None)
    if table is not None:
        table.register_forward_pre_hook(lambda _, __, kw: rows.append(kw["position_ids"] + 2), with_kwargs=True)
    out = model(
        ids,
        mask,
        labels=tensors.get("labels", ids),
        segment_lengths=case.lengths,
        output_softprompt="softprompt" in tensors,
    )
    valid = torch.ones_like(ids).bool() if mask is None else mask.bool()
    near(out.logits[valid], tensors["logits"][valid])
    near(out.loss, tensors["loss"], LOSS)
    if "softprompt" in tensors:
        near(out.softprompt, tensors["softprompt"])
    for name in (name for name in tensors if name.startswith("opt_position_ids_seg")):
        assert torch.equal(rows[int(name[-1])], tensors[name]), name


@torch.no_grad()
def test_two_calls(two_calls_case: Path) -> None:
    case = Case.read(two_calls_case)
    model, tensors = case.model(), case.tensors
    first, second = tensors["input_ids_1"], tensors["input_ids_2"]
    one = model(first, output_softprompt=True)
    near(one.softprompt, tensors["summary"])
    near(one.logits, tensors["logits_1"])
    two = model(second, labels=second, softprompt=one.softprompt)
    near(two.logits, tensors["logits_2"])
    near(two.loss, tensors["loss_2"], LOSS)
    whole = model(torch.cat([first, second], dim=1), segment_lengths=[first.shape[1], second.shape[1]])
    assert torch.equal(whole.logits, torch.cat([one.logits, two.logits], dim=1))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training(training_case: Path, checkpointing: bool) -> None:
    case = Case.read(training_case)
    model = case.model().train()
    model.compressor.segment_gradient_checkpointing = checkpointing
    ids = case.tensors["input_ids"]
    out = model(ids, labels=ids, segment_lengths=case.lengths, output_softprompt=True)
    near(out.loss, case.tensors["loss"], LOSS)
    near(out.softprompt, case.tensors["softprompt"])
    out.loss.backward()
    check_gradients(case, model)


def test_substeps(substeps_case: Path) -> None:
    case = Case.read(substeps_case)
    model = case.model().train()
    substeps, ids = case.substeps(), case.tensors["input_ids"]
    losses = []
    readings = substep_readings(model.compressor, substeps, ids, output_softprompt=True)
    for index, (substep, read) in enumerate(zip(substeps, readings)):
        reading = read()
        total, count = model.compressor.loss(reading, ids[:, substep.columns])
        (total / count).backward()
        losses.append((total / count).detach())
        near(reading.prompt.vectors, case.tensors[f"softprompt_after_substep{index}"])
    near(torch.stack(losses), case.tensors["substep_loss"], LOSS)
    near(torch.stack(losses).mean(), case.tensors["returned_loss"], LOSS)
    check_gradients(case, model)


def test_substeps_without_cutting_the_graph(substeps_case: Path) -> None:
    case = Case.read(substeps_case)
    expected = case.remark(f"{case.path.stem.split('_')[0]}_no_detach").get("grad_norm_embed_summary")
    if expected is None:
        pytest.skip("the manifest does not tell the norm")
    model, ids = case.model().train(), case.tensors["input_ids"]
    prompt, losses = None, []
    for substep in case.substeps():
        part = ids[:, substep.columns]
        out = model(
            part, labels=part, segment_lengths=substep.segment_lengths, softprompt=prompt, output_softprompt=True
        )
        prompt = out.prompt
        losses.append(out.loss)
    torch.stack(losses).sum().backward()
    norm = gradients_of(model)["embed_summary.weight"].norm()
    assert float(norm) == pytest.approx(expected, rel=1e-3)


@torch.no_grad()
def test_metrics(metrics_case: Path) -> None:
    case = Case.read(metrics_case)
    model = case.model()
    (substep,) = fixed_substeps(case.tensors["input_ids"].shape[1], 1, case.meta["segment_lengths"])
    ids = case.tensors["input_ids"][:, substep.columns]
    out = model(ids, labels=ids, segment_lengths=substep.segment_lengths)
    near(out.loss, case.tensors["total_loss"], LOSS)
    whole, segments = segment_scores(out.logits, ids, substep.segment_lengths)
    for name, scores in {"avg": whole, **{f"seg{i}": part for i, part in enumerate(segments)}}.items():
        prefix = f"metric.substep_0-{name}"
        near(scores.mean_nll, case.tensors[f"{prefix}-nll"], LOSS, name)
        near(scores.accuracy, case.tensors[f"{prefix}-acc"], LOSS, name)
        if f"{prefix}-numtokens" in case.tensors:
            assert torch.equal(scores.tokens, case.tensors[f"{prefix}-numtokens"])


def test_generation(generation_case: Path) -> None:
    case = Case.read(generation_case)
    model, prompt, expected = case.model(), case.tensors["prompt"], case.tensors["generated"]
    output = model.generate(
        prompt,
        softprompt=case.tensors["softprompt"],
        max_new_tokens=expected.shape[1] - prompt.shape[1],
        do_sample=False,
        eos_token_id=None,
        output_logits=True,
        return_dict_in_generate=True,
    )
    assert torch.equal(output.sequences, expected)
    near(torch.stack(output.logits, dim=1), case.tensors["step_logits"])


def test_compressing_while_decoding(decoding_case: Path) -> None:
    case = Case.read(decoding_case)
    model, prompt, expected = case.model(), case.tensors["prompt"], case.tensors["tokens"]
    output = generate_segments(
        model.compressor,
        prompt,
        None,
        SoftPrompt.of(case.tensors["softprompt"]),
        segment_length=case.meta["segment_lengths"],
        max_new_tokens=expected.shape[1] - prompt.shape[1],
        eos_token_id=(),
        output_logits=True,
    )
    assert torch.equal(output.sequences, expected)
    near(output.logits, case.tensors["step_logits"])
    near(output.prompt.vectors, case.tensors["final_softprompt"])
    if "softprompt_len_per_step" in case.meta:
        assert output.prompt_lengths[0].tolist() == case.meta["softprompt_len_per_step"]


def test_soft_compression(soft_case: Path) -> None:
    case = Case.read(soft_case)
    model, tensors = case.variable().train(), case.tensors
    ids = tensors["input_ids"]
    out = model(ids, labels=ids, segment_lengths=case.lengths, output_softprompt=True)
    assert torch.equal(ids.masked_fill(out.reading.unscored, -100), tensors["masked_labels"])
    near(out.logits, tensors["logits"])
    near(out.loss, tensors["loss"], LOSS)
    near(out.loss - out.reading.penalty, tensors["ce_loss"], LOSS)
    near(out.softprompt, tensors["softprompt"])
    check_reports(case, out.reading)
    for index, report in enumerate(out.reading.reports):
        near(report.gate, tensors[f"seg{index}.gate"])
        near(report.gate[..., None] * report.z, tensors[f"seg{index}.memory"])
        near(report.expected_length, tensors[f"seg{index}.expected_length"])
        near(report.penalty, tensors[f"seg{index}.length_penalty"])
        assert torch.equal(report.text_length.float(), tensors[f"seg{index}.text_length"].float())
    out.loss.backward()
    check_gradients(case, model)


def check_reports(case: Case, reading: Any) -> None:
    ends = torch.tensor(reading.segment_lengths).cumsum(0) - 1
    for index, report in enumerate(reading.reports):
        near(reading.hidden[:, ends[index]], case.tensors[f"seg{index}.z0"])
        near(report.z, case.tensors[f"seg{index}.z"])
        near(report.stop, case.tensors[f"seg{index}.p_eoc"])


@torch.no_grad()
def test_hard_compression_that_never_stops(hard_case: Path) -> None:
    case = Case.read(hard_case)
    model, ids = case.variable(), case.tensors["input_ids"]
    out = model(ids, labels=ids, segment_lengths=case.lengths, output_softprompt=True)
    near(out.logits, case.tensors["logits"])
    near(out.loss, case.tensors["loss"], LOSS)
    near(out.softprompt, case.tensors["softprompt"])
    check_reports(case, out.reading)


@torch.no_grad()
def test_hard_compression_stops_above_the_threshold(hard_case: Path) -> None:
    case = Case.read(hard_case)
    p, z = case.tensors["seg0.p_eoc"], case.tensors["seg0.z"]
    first = case.tensors["input_ids"][:, : case.meta["segment_lengths"][0]]
    seen = set()
    for threshold in (0.0001, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.9):
        prompt = case.variable(threshold)(first, output_softprompt=True).prompt
        for row in range(len(p)):
            kept = int((p[row] <= threshold).long().cumprod(0).sum())
            seen.add(kept)
            assert int(prompt.lengths[row]) == kept
            near(prompt.vectors[row][prompt.valid[row]], z[row, :kept])
    assert len(seen) > 1, "one length for all thresholds shows nothing"


def test_insertion(insertion_case: Path) -> None:
    case = Case.read(insertion_case)
    config = json.loads((insertion_case.parent / "config.json").read_text())
    controls = TableControls(config["sum_token_id"], config["eoc_token_id"])
    summary = VariableSummary(controls, insertion="overwrite")
    expected, mask = case.tensors["input_ids"], case.tensors["attention_mask"].bool()
    ids = torch.full_like(expected, config["bos_token_id"])
    for row, raw in enumerate(case.meta["raw"]):
        ids[row, : len(raw)] = torch.tensor(raw)
    lengths = case.meta["segment_lengths"] * case.meta["training_substeps"]
    rest = ids.shape[1] - sum(lengths)
    marked = summary.mark(ids, mask, [*lengths, rest] if rest else lengths, len(lengths))
    assert torch.equal(marked.input_ids, expected)
    theirs = case.tensors["labels"]
    assert torch.equal(theirs.masked_fill(expected == config["sum_token_id"], -100) == -100, marked.unscored | ~mask)


def test_published_layout(hub: Path) -> None:
    """Sharded pickles of tensors, one of them a view on a larger storage."""
    model = AutoCompressorModel.from_pretrained(hub)
    plain = hub.parent / hub.name.removeprefix("hub_layout_") / "model.safetensors"
    expected = load_file(plain)
    index = json.loads((hub / "pytorch_model.bin.index.json").read_text())["weight_map"]
    found = {**model.backbone.state_dict(), **model.summary.state_dict()}
    assert index.keys() <= found.keys()
    table = found["embed_summary.weight"]
    assert table.untyped_storage().nbytes() == table.numel() * 4
    for name in index:
        assert torch.equal(found[name].float(), expected[name].to(model.backbone.dtype).float()), name


def test_random_segment_lengths(reference: Path) -> None:
    path = reference / "autocompressor" / "random_segment_lengths.json"
    for entry in json.loads(path.read_text()):
        for seed, expected in enumerate(entry["seeds_0_to_5"]):
            torch.manual_seed(seed)
            found = random_segment_lengths(entry["length"], entry["num_segments"], entry["max_position_embeddings"])
            assert found == expected
