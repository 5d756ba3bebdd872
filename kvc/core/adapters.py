"""A trained LoRA that becomes part of the base model: what is learned next stands on it."""

import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import PreTrainedModel

from kvc.core.files import digest_files
from kvc.errors import UserError, first_sentence

WEIGHTS, CONFIG, MANIFEST = "adapter_model.safetensors", "adapter_config.json", "kvc.json"
KEY = "backbone.merge_adapter"


def adapter_folder(name: str) -> Path:
    """Find a PEFT adapter.

    Args:
        name: A folder, or the id of an adapter on the Hub, of which the files of the adapter alone are fetched.

    Raises:
        UserError: If there is none.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        if name.startswith((".", "/", "~")) or name.count("/") != 1:
            raise UserError(f"{KEY}: there is no folder {name}")
        folder = _fetched(name)
    for file in (CONFIG, WEIGHTS):
        if not (folder / file).is_file():
            raise UserError(f"{KEY}: {name} holds no {file}, so it is not a PEFT adapter in safetensors")
    return folder


def _fetched(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=[WEIGHTS, CONFIG, MANIFEST]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        offline = os.environ.get("HF_HUB_OFFLINE", "0") not in {"", "0"}
        reason = "HF_HUB_OFFLINE is set, and it is not in the cache" if offline else first_sentence(str(error))
        raise UserError(f"{KEY}: there is no folder '{name}', and no such adapter on the Hub: {reason}") from error


def adapter_digest(folder: Path) -> str:
    """A name of an adapter's contents."""
    return digest_files(folder / CONFIG, folder / WEIGHTS)


def merge_adapter(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Add an adapter's product to the weights; the model is a plain one again.

    Args:
        model: The base model that the adapter was trained on.
        folder: As `adapter_folder` gives it.

    Raises:
        UserError: If the adapter is broken, no LoRA, does not fit the model, or cannot become part of its weights.
    """
    from peft import LoraConfig, PeftModel
    from peft.tuners.lora import LoraLayer

    _refuse_conditional(folder)
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is not None and embeddings.weight is head.weight
    try:
        settings: Any = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        if settings.get("peft_type") != "LORA":
            raise UserError(f"{KEY}: {folder} is an adapter of type {settings.get('peft_type')}, only LoRA is merged")
        config = LoraConfig.from_pretrained(str(folder))
        wrapped = PeftModel(model, config)
        loaded = wrapped.load_adapter(str(folder), "default", use_safetensors=True)
    except (OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError, SafetensorError) as error:
        reason = first_sentence(str(error))
        raise UserError(f"{KEY}: {folder} does not fit {type(model).__name__}: {reason}") from error
    foreign = sorted(loaded.unexpected_keys)
    missing = [key for key in loaded.missing_keys if ".lora_" in key]
    if foreign or missing:
        raise UserError(f"{KEY}: {folder} does not fit {type(model).__name__}: {(foreign or missing)[0]} has no match")
    # Merging one of them would change the other.
    if tied and any(isinstance(m, LoraLayer) for m in (model.get_input_embeddings(), model.get_output_embeddings())):
        raise UserError(
            f"{KEY}: {folder} adapts the embeddings or the LM head of {type(model).__name__}, which share their weights"
        )
    try:
        merged: PreTrainedModel = wrapped.merge_and_unload(safe_merge=True)
    except (ValueError, RuntimeError) as error:
        raise UserError(f"{KEY}: {folder} cannot be merged: {first_sentence(str(error))}") from error
    return merged


def _refuse_conditional(folder: Path) -> None:
    """A LoRA that acted on some tokens only would act on all of them as part of the weights."""
    path = folder / MANIFEST
    if not path.is_file():
        return
    try:
        method = json.loads(path.read_text(encoding="utf-8"))["model"]
        conditional = method.get("init_args", {}).get("cond_lora", False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{KEY}: {path} cannot be read as the manifest of an export") from error
    if conditional:
        raise UserError(
            f"{KEY}: {folder} is a conditional LoRA, for memory tokens alone: it cannot be part of the weights"
        )
