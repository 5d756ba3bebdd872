"""Folders in the layout of the published AutoCompressors, and back.

A folder is one of the base model with two more things: the tensor `embed_summary.weight` `[kappa, D]`, and further keys
in `config.json` (see `kvc.methods.autocompressor.settings`).
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import cached_file, logging

from kvc.errors import UserError, first_sentence

SUMMARY = "embed_summary.weight"
HARMLESS = (".rotary_emb.inv_freq",)
"""Ends of names that older releases wrote, and no model reads any more."""


@dataclass(frozen=True)
class Loaded:
    """What a folder holds.

    Attributes:
        backbone: The base model, in eval mode; its config has the further keys of the folder.
        embed_summary: fp32 `[kappa, D]`; None where the folder has none.
    """

    backbone: PreTrainedModel
    embed_summary: torch.Tensor | None


def load(
    source: str | os.PathLike[str],
    check_family: Callable[[str], None],
    dtype: str | torch.dtype,
    attn_implementation: str,
    revision: str | None,
) -> Loaded:
    """Read a folder or Hub repository; nothing in it is unpickled but tensors.

    Args:
        source: Folder or Hub id.
        check_family: Refuses model types.
        dtype: Precision of the weights.
        attn_implementation: Attention kernel.
        revision: Of a Hub repository.

    Raises:
        UserError: If files are missing or broken, or tensors are missing, foreign or of another shape.
    """
    name = str(Path(source).expanduser()) if Path(source).expanduser().is_dir() else str(source)
    if not Path(name).is_dir() and (name.startswith((".", "/", "~")) or name.count("/") != 1):
        raise UserError(f"there is no folder {name} to load an AutoCompressor from")
    # The tensor that the base model has no place for is ours, and no cause for a warning.
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        config: Any = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)
        check_family(str(config.model_type))
        model, info = AutoModelForCausalLM.from_pretrained(
            name,
            config=config,
            dtype=dtype,
            attn_implementation=attn_implementation,
            revision=revision,
            trust_remote_code=False,
            weights_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    except UserError:
        raise
    except Exception as error:  # transformers and torch raise whatever their readers of files raise
        if "unsupported global" in str(error).lower():
            raise UserError(f"{name}: its weights hold pickled objects, which are never loaded") from error
        raise UserError(f"{name}: cannot load the base model: {first_sentence(str(error))}") from error
    finally:
        logging.set_verbosity(verbosity)
    _check(name, info)
    table = summary_table(name, revision)
    if table is not None:
        embedding: Any = model.get_input_embeddings()
        wanted = [getattr(config, "summary_length", len(table)), embedding.weight.shape[1]]
        if [*table.shape] != wanted:
            raise UserError(
                f"{name}: {SUMMARY} has shape {[*table.shape]}, the model of its config.json needs {wanted}"
            )
    return Loaded(model.eval(), table)


def _check(name: str, info: dict[str, Any]) -> None:
    """Refuse tensors that the base model lacks or has no place for."""
    if mismatched := sorted(info["mismatched_keys"]):
        key, found, wanted = mismatched[0]
        raise UserError(f"{name}: {key} has shape {[*found]}, the model of its config.json needs {[*wanted]}")
    if missing := sorted(info["missing_keys"]):
        raise UserError(f"{name} lacks {len(missing)} tensors of the base model, e.g. {missing[0]}")
    foreign = [key for key in sorted(info["unexpected_keys"]) if key != SUMMARY and not key.endswith(HARMLESS)]
    if foreign:
        raise UserError(f"{name} holds {len(foreign)} tensors that the model has no place for, e.g. {foreign[0]}")


def summary_table(name: str, revision: str | None) -> torch.Tensor | None:
    """The summary embeddings, fp32, with a storage of their own: some releases hold them as a view on a larger one."""
    for index, whole in (
        ("model.safetensors.index.json", "model.safetensors"),
        ("pytorch_model.bin.index.json", "pytorch_model.bin"),
    ):
        file = _file(name, index, revision)
        shard: str | None = whole
        if file is not None:
            shard = json.loads(file.read_text(encoding="utf-8"))["weight_map"].get(SUMMARY)
        path = None if shard is None else _file(name, shard, revision)
        if path is not None:
            return _tensor(path)
        if file is not None:
            return None
    return None


def _file(name: str, file: str, revision: str | None) -> Path | None:
    path = cached_file(
        name,
        file,
        revision=revision,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if path is None else Path(path)


def _tensor(path: Path) -> torch.Tensor | None:
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as tensors:
            if SUMMARY not in tensors.keys():  # noqa: SIM118 - it is no dict
                return None
            found: torch.Tensor = tensors.get_tensor(SUMMARY)
            return found.float().clone()
    state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    return state[SUMMARY].float().clone() if SUMMARY in state else None


@torch.no_grad()
def save(
    folder: str | os.PathLike[str],
    backbone: PreTrainedModel,
    tensors: dict[str, torch.Tensor],
    fields: dict[str, Any],
) -> None:
    """Write a folder: safetensors, config.json and, where the model has one, generation_config.json.

    Args:
        folder: New, or one whose files may be replaced.
        backbone: The base model; its LoRA is merged in the files, and stays as it is in memory.
        tensors: Further tensors, and those that stand in the place of others.
        fields: Further keys of the configuration, and those that stand in the place of others.

    Raises:
        UserError: If the folder cannot be written.
    """
    path, base = Path(folder), base_of(backbone)
    # The published files hold tied weights twice; safetensors holds each storage once.
    state = {name: tensor.detach().cpu().clone() for name, tensor in {**merged_state(backbone), **tensors}.items()}
    try:
        path.mkdir(parents=True, exist_ok=True)
        save_torch_state_dict(state, path, metadata={"format": "pt"})
        config: Any = base.config.to_dict() | fields
        (path / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        if base.can_generate():
            base.generation_config.save_pretrained(path)
    except OSError as error:
        raise UserError(f"cannot write to {path}: {error.strerror or error}") from error


def merged_state(backbone: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Weights of the base model by its own names, with LoRA added to the matrices that it adapts."""
    base = base_of(backbone)
    if base is backbone:
        return dict(backbone.state_dict())
    from peft.tuners.lora import LoraLayer

    state = {name.replace(".base_layer.", "."): t for name, t in base.state_dict().items() if ".lora_" not in name}
    for name, module in base.named_modules():
        if isinstance(module, LoraLayer):
            weight: Any = module.get_base_layer().weight
            delta = sum(module.get_delta_weight(adapter).float() for adapter in module.active_adapters)
            state[f"{name}.weight"] = (weight.float() + delta).to(weight.dtype)
    return state


def base_of(backbone: PreTrainedModel) -> PreTrainedModel:
    """The model below a PEFT wrapper."""
    get: Any = getattr(backbone, "get_base_model", None)
    base: PreTrainedModel = backbone if get is None else get()
    return base
