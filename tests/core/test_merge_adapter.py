"""A trained LoRA that is added to the base model's weights."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from kvc.core.adapters import adapter_folder
from kvc.core.backbone import Backbone, Lora
from kvc.errors import UserError

IDS = torch.tensor([[1, 40, 41, 42, 43, 44]])


def trained(tiny_folder: Any, folder: Path, **settings: Any) -> torch.Tensor:
    """Saves an adapter; returns the logits of the model that has it."""
    model = Backbone(pretrained=str(tiny_folder), lora=Lora(r=4, dropout=0.0, **settings)).load().eval()
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    model.save_pretrained(folder)
    with torch.no_grad():
        return model(IDS).logits


@torch.no_grad()
def test_merged_weights_give_what_the_adapter_gave(tiny_folder: Any, tmp_path: Path) -> None:
    expected = trained(tiny_folder, tmp_path / "adapter")
    merged = Backbone(pretrained=str(tiny_folder), merge_adapter=str(tmp_path / "adapter")).load().eval()
    plain = Backbone(pretrained=str(tiny_folder)).load().eval()
    torch.testing.assert_close(merged(IDS).logits, expected, atol=1e-4, rtol=1e-4)
    assert (plain(IDS).logits - expected).abs().max() > 0.1
    assert [name for name, _ in merged.named_parameters()] == [name for name, _ in plain.named_parameters()]
    assert not any(p.requires_grad for p in merged.parameters())


@torch.no_grad()
def test_a_new_adapter_stands_on_the_merged_model(tiny_folder: Any, tmp_path: Path) -> None:
    expected = trained(tiny_folder, tmp_path / "adapter")
    model = Backbone(pretrained=str(tiny_folder), merge_adapter=str(tmp_path / "adapter"), lora=Lora(r=2)).load().eval()
    torch.testing.assert_close(model(IDS).logits, expected, atol=1e-4, rtol=1e-4)
    assert list(model.peft_config) == ["default"]
    assert {p.shape[0] for name, p in model.named_parameters() if ".lora_A." in name} == {2}


def test_the_identity_names_the_merged_adapter(tiny_folder: Any, tmp_path: Path) -> None:
    trained(tiny_folder, tmp_path / "one")
    trained(tiny_folder, tmp_path / "two", alpha=8)
    identities = {
        Backbone(pretrained=str(tiny_folder), merge_adapter=str(folder) if folder else None).identity()
        for folder in (None, tmp_path / "one", tmp_path / "two")
    }
    assert len(identities) == 3


def test_what_is_no_fitting_adapter_is_refused(tiny_folder: Any, tmp_path: Path) -> None:
    def load(folder: Any) -> None:
        Backbone(pretrained=str(tiny_folder), merge_adapter=str(folder)).load()

    with pytest.raises(UserError, match=r"backbone.merge_adapter: there is no folder /no/such/place"):
        load("/no/such/place")
    with pytest.raises(UserError, match=r"backbone.merge_adapter: .* HF_HUB_OFFLINE is set"):
        load("someone/adapter")
    with pytest.raises(UserError, match=r"holds no adapter_config.json"):
        load(tmp_path)
    trained(tiny_folder, tmp_path / "adapter")
    config = tmp_path / "adapter" / "adapter_config.json"
    settings = json.loads(config.read_text())
    for key, value, sentence in [
        ("peft_type", "IA3", "an adapter of type IA3, only LoRA is merged"),
        ("r", 8, "does not fit LlamaForCausalLM"),
        ("target_modules", ["gate_proj"], "does not fit LlamaForCausalLM"),
        ("target_modules", ["nothing"], "does not fit LlamaForCausalLM"),
    ]:
        config.write_text(json.dumps({**settings, key: value}))
        with pytest.raises(UserError, match=sentence):
            load(tmp_path / "adapter")
    for broken in ("{", "[]"):
        config.write_text(broken)
        with pytest.raises(UserError, match="does not fit LlamaForCausalLM"):
            load(tmp_path / "adapter")
    config.write_text(json.dumps(settings))
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"junk")
    with pytest.raises(UserError, match="does not fit LlamaForCausalLM"):
        load(tmp_path / "adapter")


def adapter(tiny_folder: Any, folder: Path, **settings: Any) -> None:
    """Saves an untrained PEFT LoRA."""
    model = Backbone(pretrained=str(tiny_folder)).load()
    get_peft_model(model, LoraConfig(r=2, task_type="CAUSAL_LM", **settings)).save_pretrained(folder)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"target_modules": ["q_proj", "lm_head"]}, "adapts the embeddings or the LM head .* share their weights"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "adapts the embeddings or the LM head .* share their weights"),
        ({"target_modules": ["q_proj"], "lora_bias": True}, "cannot be merged: Impossible to merge LoRA"),
    ],
)
def test_what_cannot_be_part_of_the_weights_is_refused(
    tiny_folder: Any, tmp_path: Path, settings: Any, sentence: str
) -> None:
    """The tiny model's embeddings and head are one tensor, and its projections have no bias."""
    adapter(tiny_folder, tmp_path / "adapter", **settings)
    with pytest.raises(UserError, match=f"backbone.merge_adapter: .* {sentence}"):
        Backbone(pretrained=str(tiny_folder), merge_adapter=str(tmp_path / "adapter")).load()


def test_an_exported_conditional_lora_is_refused(tiny_folder: Any, tmp_path: Path) -> None:
    trained(tiny_folder, tmp_path / "adapter")
    base = Backbone(pretrained=str(tiny_folder), merge_adapter=str(tmp_path / "adapter"))
    manifest = tmp_path / "adapter" / "kvc.json"
    for settings in ({"cond_lora": False}, {}):
        manifest.write_text(json.dumps({"model": {"init_args": settings}}))
        base.load()
    manifest.write_text(json.dumps({"model": {"init_args": {"cond_lora": True}}}))
    with pytest.raises(UserError, match=r"backbone.merge_adapter: .* is a conditional LoRA"):
        base.load()
    manifest.write_text("[]")
    with pytest.raises(UserError, match=r"backbone.merge_adapter: .*kvc.json cannot be read"):
        base.load()


def test_all_that_decides_is_fetched_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the manifest, a conditional LoRA would look like an ordinary one."""
    asked: dict[str, Any] = {}

    def snapshot(name: str, allow_patterns: list[str]) -> str:
        asked[name] = set(allow_patterns)
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            (tmp_path / file).write_text("{}")
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert adapter_folder("someone/adapter") == tmp_path
    assert asked == {"someone/adapter": {"adapter_config.json", "adapter_model.safetensors", "kvc.json"}}
