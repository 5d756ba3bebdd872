"""Published layouts: what loads, what is written, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from autocompressor_tiny import adapted, base, fixed, kernel, perturbed
from safetensors.torch import load_file, save_file

import kvc
from kvc.errors import UserError
from kvc.methods.autocompressor import AutoCompressorModel, LlamaAutoCompressorModel, OPTAutoCompressorModel
from kvc.methods.autocompressor.controls import OwnControls, TableControls
from kvc.methods.autocompressor.fixed import FixedSummary
from kvc.methods.autocompressor.stopping import Stopping
from kvc.methods.autocompressor.variable import VariableSummary

CLASSES: dict[str, Any] = {"llama-gqa": LlamaAutoCompressorModel, "opt": OPTAutoCompressorModel}


def text(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 64, shape, generator=torch.Generator().manual_seed(seed))


def written(folder: Path, family: str = "llama-gqa", **kwargs: Any) -> Any:
    """A model in the published layout."""
    backbone = base(family)
    summary = FixedSummary(backbone, 3, **kwargs)
    perturbed(summary, 0.3)
    model = CLASSES[family](backbone, summary, segment_gradient_checkpointing=True).eval()
    model.save_pretrained(folder)
    return model


@torch.no_grad()
def same(one: Any, two: Any, **near: float) -> None:
    ids = text(2, 12)
    mine, theirs = (m(ids, labels=ids, segment_lengths=[5, 7], output_softprompt=True) for m in (one, two))
    torch.testing.assert_close(mine.logits, theirs.logits, **near)
    torch.testing.assert_close(mine.softprompt, theirs.softprompt, **near)
    torch.testing.assert_close(mine.loss, theirs.loss, **near)


@pytest.mark.parametrize("accumulate", [True, False])
@pytest.mark.parametrize("family", CLASSES)
def test_what_is_written_loads_again(family: str, accumulate: bool, tmp_path: Path) -> None:
    model = written(tmp_path, family, accumulate=accumulate)
    again = CLASSES[family].from_pretrained(tmp_path)
    same(model, again)
    same(model, AutoCompressorModel.from_pretrained(tmp_path))
    same(model, kvc.load(str(tmp_path)))
    assert not again.training
    assert again.summary.accumulate is accumulate
    assert again.compressor.segment_gradient_checkpointing
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == [CLASSES[family].__name__]
    assert (config["summary_length"], config["accumulate_summary"]) == (3, accumulate)
    names = load_file(tmp_path / "model.safetensors")
    assert {"embed_summary.weight", "lm_head.weight"} <= names.keys()
    assert not [name for name in names if "inv_freq" in name]


@pytest.mark.parametrize("family", CLASSES)
def test_sharded_pickles_of_tensors(family: str, tmp_path: Path) -> None:
    """As released: two shards, the summary embeddings a view on a larger storage, old buffers beside them."""
    model = written(tmp_path, family)
    state = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    large = torch.zeros(64, state["embed_summary.weight"].shape[1])
    large[:3] = state["embed_summary.weight"]
    state["embed_summary.weight"] = large[:3]
    if family != "opt":
        state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    names = sorted(state)
    shards = {name: f"pytorch_model-0000{1 + (i % 2)}-of-00002.bin" for i, name in enumerate(names)}
    for shard in set(shards.values()):
        torch.save({name: state[name] for name in names if shards[name] == shard}, tmp_path / shard)
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    again = AutoCompressorModel.from_pretrained(tmp_path)
    same(model, again)
    table = again.summary.embed_summary.weight
    assert table.untyped_storage().nbytes() == table.numel() * 4


def test_no_pickled_code_runs(tmp_path: Path) -> None:
    written(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Path("x")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="pickled objects"):
        AutoCompressorModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("family", CLASSES)
def test_a_base_model_begins_with_its_eos_embedding(family: str, tmp_path: Path) -> None:
    backbone = base(family)
    backbone.save_pretrained(tmp_path)
    model = CLASSES[family].from_pretrained(tmp_path, summary_length=4)
    row = backbone.get_input_embeddings().weight[2]
    assert torch.equal(model.summary.embed_summary.weight, row.expand(4, -1))
    with pytest.raises(UserError, match="summary_length"):
        CLASSES[family].from_pretrained(tmp_path)


def test_models_without_summaries_and_with_replaced_ones(tmp_path: Path) -> None:
    """The baselines of the paper: full attention, and memory that is replaced."""
    backbone = base()
    AutoCompressorModel(backbone, FixedSummary(backbone, 0)).save_pretrained(tmp_path)
    model = AutoCompressorModel.from_pretrained(tmp_path)
    ids = text(1, 9)
    out = model(ids, output_softprompt=True)
    assert out.softprompt.shape == (1, 0, 32)
    torch.testing.assert_close(out.logits, backbone(ids).logits)
    assert not AutoCompressorModel.from_pretrained(
        tmp_path, summary_length=2, accumulate_summary=False
    ).summary.accumulate


def test_lora_is_merged_in_the_files_alone(tmp_path: Path) -> None:
    backbone = adapted(base())
    model = AutoCompressorModel(backbone, FixedSummary(backbone, 3)).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path)
    same(model, AutoCompressorModel.from_pretrained(tmp_path), rtol=1e-4, atol=1e-5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not [name for name in load_file(tmp_path / "model.safetensors") if "lora" in name or "base_" in name]


@pytest.mark.parametrize("family", [*CLASSES, "gemma2"])
@pytest.mark.parametrize("kind", ["own", "table", "rows"])
@torch.no_grad()
def test_variable_length_in_the_layout_of_the_fork(family: str, kind: str, tmp_path: Path) -> None:
    backbone = base(family, vocab_size=64 if kind == "own" else 66)
    controls = OwnControls(backbone, "vocabulary") if kind == "own" else TableControls(64, 65)
    if isinstance(controls, TableControls) and kind == "rows":
        backbone = adapted(backbone, targets=["q_proj", "v_proj"])
        controls.train_rows(backbone)
    perturbed(controls, 0.5)
    stop = Stopping("threshold", 0.02)
    summary = VariableSummary(controls, 4, 0.3, 0.5, "before", stop, "append")
    model = AutoCompressorModel(backbone, summary, truncate_bptt_segments=2).eval()
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    model.save_pretrained(tmp_path)
    settings: Any = {"attn_implementation": kernel(family)}
    again = AutoCompressorModel.from_pretrained(tmp_path, **settings)
    assert isinstance(again.summary.controls, TableControls)
    AutoCompressorModel.from_pretrained(tmp_path, summary_length=2, **settings).save_pretrained(tmp_path / "fixed")
    assert isinstance(AutoCompressorModel.from_pretrained(tmp_path / "fixed", **settings).summary, FixedSummary)
    assert again.compressor.truncate_bptt_segments == 2
    ids = text(4, 12)
    one, two = (m.compressor.read(ids, segment_lengths=[5, 7], output_softprompt=True) for m in (model, again))
    torch.testing.assert_close(one.hidden, two.hidden, rtol=1e-4, atol=1e-5)
    assert one.prompt.lengths.tolist() == two.prompt.lengths.tolist()
    for mine, theirs in zip(one.reports, two.reports):
        torch.testing.assert_close(mine.stop, theirs.stop, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(
        model.compressor.logits(one.hidden)[..., :64],
        again.compressor.logits(two.hidden)[..., :64],
        rtol=1e-4,
        atol=1e-5,
    )
    assert all(torch.equal(tensor, before[name]) for name, tensor in backbone.state_dict().items())


def test_what_the_layout_cannot_hold(tmp_path: Path) -> None:
    backbone = base()
    for summary, why in (
        (VariableSummary(OwnControls(backbone, "binary")), "binary"),
        (VariableSummary(OwnControls(backbone, "vocabulary"), stopping=Stopping("sample")), "sample"),
    ):
        with pytest.raises(UserError, match=why):
            AutoCompressorModel(backbone, summary).save_pretrained(tmp_path / "out")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        AutoCompressorModel(backbone).save_pretrained(tmp_path / "file" / "out")


def changed(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    written(tmp_path)
    state = load_file(tmp_path / "model.safetensors")

    def refused(match: str, state: dict[str, torch.Tensor] = state, **kwargs: Any) -> None:
        save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(UserError, match=match) as error:
            LlamaAutoCompressorModel.from_pretrained(tmp_path, **kwargs)
        assert "\n" not in str(error.value)

    refused("lacks 1 tensors.*q_proj", {k: v for k, v in state.items() if "0.self_attn.q_proj" not in k})
    refused("no place for, e.g. strange", {**state, "strange": torch.ones(1)})
    refused(r"norm.weight has shape \[16\]", {**state, "model.norm.weight": torch.ones(16)})
    refused(r"embed_summary.weight has shape \[3, 16\]", {**state, "embed_summary.weight": torch.ones(3, 16)})
    refused("3 summary tokens, not 5", summary_length=5)
    changed(tmp_path, hidden_size=64)
    refused("shape")
    with pytest.raises(UserError, match="no folder"):
        AutoCompressorModel.from_pretrained(tmp_path / "nothing")
    with pytest.raises(UserError, match="cannot load"):
        AutoCompressorModel.from_pretrained("owner/nothing")


def test_families_are_not_mixed_up(tmp_path: Path) -> None:
    written(tmp_path / "llama")
    written(tmp_path / "opt", "opt")
    with pytest.raises(UserError, match="'llama'"):
        OPTAutoCompressorModel.from_pretrained(tmp_path / "llama")
    with pytest.raises(UserError, match="'opt'"):
        LlamaAutoCompressorModel.from_pretrained(tmp_path / "opt")


@torch.no_grad()
def test_more_positions_for_opt(tmp_path: Path) -> None:
    model = written(tmp_path, "opt")
    longer = OPTAutoCompressorModel.from_pretrained(tmp_path, max_position_embeddings=150)
    table, old = (m.backbone.get_decoder().embed_positions.weight for m in (longer, model))
    assert len(table) == 152
    assert torch.equal(table[:66], old)
    assert torch.equal(table[66:130], old[2:])
    assert torch.equal(table[130:], old[2:24])
    same(model, longer)
    assert longer(text(1, 150)).logits.shape[1] == 150
    with pytest.raises(UserError, match="64 positions"):
        model(text(1, 65))
    written(tmp_path / "llama")
    with pytest.raises(UserError, match="no table"):
        LlamaAutoCompressorModel.from_pretrained(tmp_path / "llama", max_position_embeddings=999)


def test_no_gradient_reaches_the_row_without_position() -> None:
    model = base("opt")
    table = model.get_decoder().embed_positions
    with torch.no_grad():
        table.weight[1] = 7
    compressor = fixed(model=model)
    assert not table.weight[1].any()
    model.train()
    ids = text(2, 8)
    compressor.loss(compressor.read(ids, segment_lengths=4), ids)[0].backward()
    assert table.weight.grad is not None
    assert not table.weight.grad[1].any()
    assert table.weight.grad[2:6].any()
