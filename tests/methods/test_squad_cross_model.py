"""Compress in one model, answer with another of other width and tokenizer."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cases
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import kvc
from kvc.__main__ import main
from kvc.errors import UserError
from kvc.methods.squad.converter import Converter, Translation
from kvc.methods.squad.cross_model import CrossModelConverter
from kvc.methods.squad.reading import Tokens

SQUAD = "kvc.methods.squad"
DATA = {"class_path": "kvc.data.squad.Squad", "init_args": {"counts": [12, 4, 4], "facts": [2, 6], "batch_size": 4}}


@pytest.fixture(scope="module")
def models_of(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """`a`: an exported compressor of the tiny model, with a LoRA; `b`: another base model, of width 48."""
    folder = tmp_path_factory.mktemp("cross")
    config = {
        "trainer": {**cases.TRAINER, "max_epochs": 1},
        "model": {
            "class_path": f"{SQUAD}.ContextCompressor",
            "init_args": {
                "backbone": {"pretrained": str(tiny_folder), "lora": {"r": 2}},
                "source": {"frozen": False},
                "max_new_tokens": 3,
            },
        },
        "data": DATA,
    }
    assert cases.fit(config, folder / "run") == 0
    assert main(["export", str(folder / "run"), str(folder / "a")]) == 0
    shape = AutoConfig.from_pretrained(tiny_folder)
    shape.hidden_size, shape.num_attention_heads, shape.head_dim = 48, 4, 12
    torch.manual_seed(4)
    AutoModelForCausalLM.from_config(shape).save_pretrained(folder / "b")
    AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(folder / "b")
    return {"a": folder / "a", "b": folder / "b"}


def config_of(models_of: dict[str, Path], **settings: Any) -> Any:
    init = {"compressor": str(models_of["a"]), "backbone": {"pretrained": str(models_of["b"])}, "max_new_tokens": 3}
    return {
        "trainer": {**cases.TRAINER, "max_epochs": 1},
        "model": {"class_path": f"{SQUAD}.cross_model.CrossModelConverter", "init_args": {**init, **settings}},
        "data": DATA,
    }


def batch_of(made: Any) -> Any:
    from kvc.data.squad import Squad

    data = Squad(counts=(4, 4, 4), facts=(2, 9))
    data.trainer = SimpleNamespace(lightning_module=made)
    data.setup("fit")
    return data.collate("train")([data.dataset("train")[0, row] for row in range(4)])


def made_of(models_of: dict[str, Path], **settings: Any) -> CrossModelConverter:
    from kvc.core.build import build_model

    model: Any = build_model(config_of(models_of, **settings)["model"])
    return model


def exchanged(compressor: Path, out: Path) -> Path:
    """A copy of `out` that names another compressor, of the same shape."""
    other, copy = out.parent / "other", out.parent / "copy"
    shutil.copytree(compressor, other)
    shutil.copytree(out, copy)
    tensors = load_file(other / "kvc.safetensors")
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, other / "kvc.safetensors")
    manifest = (copy / "kvc.json").read_text()
    (copy / "kvc.json").write_text(manifest.replace(str(compressor), str(other)))
    return copy


def test_it_trains_leaves_and_comes_back(models_of: dict[str, Path], tmp_path: Path) -> None:
    before = kvc.load(models_of["a"]).trained_state()
    assert cases.fit(config_of(models_of), tmp_path / "run") == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert {"f1", "em"} <= result["metrics"].keys()
    saved = cases.checkpoint(tmp_path / "run")["state_dict"]
    assert saved
    assert all(name.startswith("compressor.") for name in saved)
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()
    ours, back = kvc.load(tmp_path / "run"), kvc.load(tmp_path / "out")
    found = [made.read(batch_of(made)).slots.slots for made in (ours, back)]
    assert torch.equal(*found)
    assert found[0].shape[-1] == 48
    fresh = made_of(models_of)
    assert cases.distance(ours.trained_state(), fresh.trained_state()) > 0
    with pytest.raises(UserError, match="another base model"):
        kvc.load(exchanged(models_of["a"], tmp_path / "out"))
    after = ours.reader.foreign.state_dict()
    assert cases.same_bits(before, {name: after[name] for name in before}) == []


def test_gradients_reach_the_converter_alone(models_of: dict[str, Path]) -> None:
    made = made_of(models_of).train()
    assert set(made.groups()) == {"compressor"}
    made.step(batch_of(made)).loss_sum.backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in made.compressor.parameters())
    assert all(parameter.grad is None for parameter in made.reader.foreign.parameters())
    assert not made.reader.foreign.training
    with_lora = made_of(models_of, backbone={"pretrained": str(models_of["b"]), "lora": {"r": 2}})
    assert set(with_lora.groups()) == {"compressor", "lora"}


@torch.no_grad()
def test_slots_are_those_of_the_first_model_and_as_large_as_embeddings(models_of: dict[str, Path]) -> None:
    made = made_of(models_of).eval()
    batch = batch_of(made)
    theirs = kvc.load(models_of["a"]).read(batch).slots
    ours = made.read(batch).slots
    assert torch.equal(ours.mask, theirs.mask)
    torch.testing.assert_close(ours.slots[ours.mask], made.compressor(theirs.slots)[ours.mask])
    assert not ours.slots[~ours.mask].any()
    table = made.backbone.get_input_embeddings().weight
    assert float(ours.slots[ours.mask].square().mean().sqrt() / table.square().mean().sqrt()) == pytest.approx(
        1, abs=1e-3
    )


def test_the_number_of_parameters() -> None:
    assert sum(p.numel() for p in Converter(5, 7, 1.0, 11).parameters()) == 5 + (5 * 11 + 11) + (11 * 7 + 7) + 7


def test_other_tokens_for_the_same_text(tiny_folder: Path) -> None:
    ours = AutoTokenizer.from_pretrained(tiny_folder)
    words = {word: number for number, word in enumerate(["?", "Tom", "lives", "in", "Oslo", "Ann"])}
    split = Tokenizer(models.WordLevel(words, unk_token="?"))
    split.pre_tokenizer = pre_tokenizers.Whitespace()
    theirs = PreTrainedTokenizerFast(tokenizer_object=split)
    rows = [ours(text, add_special_tokens=False)["input_ids"] for text in (" Tom lives in Oslo", " Ann")]
    size = max(map(len, rows))
    ids = torch.tensor([row + [77] * (size - len(row)) for row in rows])
    mask = torch.arange(size) < torch.tensor([[len(row)] for row in rows])
    found = Translation(ours, theirs)(Tokens(ids, mask))
    assert found.ids.tolist() == [[1, 2, 3, 4], [5, 0, 0, 0]]
    assert found.mask.tolist() == [[True] * 4, [True, False, False, False]]
    same = Tokens(ids, mask)
    assert Translation(ours, AutoTokenizer.from_pretrained(tiny_folder))(same) is same


def test_what_cannot_be_converted_is_refused(models_of: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model\.compressor: there is no folder nowhere"):
        CrossModelConverter("nowhere")
    with pytest.raises(UserError, match=r"holds no kvc\.json"):
        CrossModelConverter(str(models_of["b"]))
