"""A trained method as a folder of standard formats, and back.

* `model.safetensors`, `config.json`, tokenizer: a base model of which every weight was trained (plain Hugging Face)
* `adapter_model.safetensors`, `adapter_config.json`: LoRA of a frozen base model (plain PEFT)
* `kvc.safetensors`: every other trained tensor, by its name in `Method.trained_state()`
* `kvc.json`: method, configuration, base model; written last, so a folder that holds it is complete
"""

import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from kvc.core.files import write_json
from kvc.core.method import Method
from kvc.errors import UserError

MANIFEST, TENSORS = "kvc.json", "kvc.safetensors"
ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
SCHEMA = 1
HERE = "."
"""`backbone.pretrained` in the manifest of an export that holds its whole base model."""


@dataclass
class Parts:
    """What is trained, by the format it leaves in.

    Attributes:
        whole: A base model of which every weight was trained; None where the base is frozen.
        adapted: A base model with LoRA; None without.
        adapter: The LoRA tensors by PEFT's names.
        extra: All other trained tensors, by name.
    """

    whole: PreTrainedModel | None
    adapted: Any | None
    adapter: dict[str, torch.Tensor]
    extra: dict[str, torch.Tensor]


def parts_of(method: Method) -> Parts:
    """Divide `method.trained_state()`; every tensor lands in exactly one part."""
    extra = method.trained_state()
    adapted = next((m for m in method.modules() if _is_peft(m)), None)
    if adapted is not None:
        from peft import get_peft_model_state_dict

        # Asking PEFT about embeddings would look the base model up on the Hub.
        adapter = get_peft_model_state_dict(adapted, save_embedding_layers=False)
        # PEFT's names differ from the method's; the memory behind them does not.
        memory = {tensor.data_ptr() for tensor in adapter.values()}
        extra = {name: tensor for name, tensor in extra.items() if tensor.data_ptr() not in memory}
        return Parts(None, adapted, adapter, extra)
    for name, child in method.named_children():
        if isinstance(child, PreTrainedModel) and all(p.requires_grad for p in child.parameters()):
            extra = {key: tensor for key, tensor in extra.items() if not key.startswith(f"{name}.")}
            return Parts(child, None, {}, extra)
    return Parts(None, None, {}, extra)


def write_export(method: Method, folder: Path, manifest: dict[str, Any], card: str, overwrite: bool = False) -> None:
    """Write `method` into `folder`.

    Args:
        method: A trained method.
        folder: New or empty, unless `overwrite`. Files that are not part of the export stay as they are.
        manifest: For `kvc.json`: at least `model` (class_path and init_args) and `base_model` (name and hash).
        card: Text of `README.md`.
        overwrite: Write into a folder that holds something; files of an earlier export that this one lacks go.

    Raises:
        UserError: If the folder may not or cannot be written.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file, not a folder")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise UserError(f"{folder} is not empty: pass --overwrite to write into it, other files stay")
    if (folder / "checkpoints").is_dir():
        raise UserError(f"{folder} is a run folder: export into another one")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # On the same disk as its files' final place, so that a move is a rename.
        place = folder if folder.is_dir() else folder.parent
        temporary = Path(tempfile.mkdtemp(dir=place, prefix=".export.", suffix=".tmp"))
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}") from error
    try:
        manifest = _write_tensors(method, temporary, manifest)
        (temporary / "README.md").write_text(card, encoding="utf-8")
        names = sorted(path.name for path in temporary.iterdir())
        write_json(temporary / MANIFEST, {**manifest, "files": names})
        _move(temporary, folder, names)
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_tensors(method: Method, folder: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """Write the weights; returns the manifest, changed where the export is its own base model."""
    parts = parts_of(method)
    if parts.whole is not None:
        parts.whole.save_pretrained(folder)
        tokenizer = getattr(method, "tokenizer", None)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
            _forget_machine(folder / "tokenizer_config.json")
        manifest = {**manifest, "model": _own_base(manifest["model"]), "trained_from": manifest["base_model"]}
        manifest.pop("base_model")
    if parts.adapted is not None:
        parts.adapted.save_pretrained(folder, selected_adapters=["default"], save_embedding_layers=False)
        settings = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        # PEFT would store where the base model lies on this machine.
        settings["base_model_name_or_path"] = manifest["base_model"]["name"]
        write_json(folder / ADAPTER_CONFIG, settings)
    if parts.extra:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in parts.extra.items()}, folder / TENSORS)
    return manifest


def _own_base(model: dict[str, Any]) -> dict[str, Any]:
    """The model's configuration with the exported folder itself as base model, in the precision it was saved in."""
    arguments = dict(model.get("init_args") or {})
    own = {"pretrained": HERE, "from_config": False, "overrides": {}, "dtype": "auto", "revision": None}
    arguments["backbone"] = {**(arguments.get("backbone") or {}), **own}
    return {**model, "init_args": arguments}


def _forget_machine(path: Path) -> None:
    """Drop what transformers notes about how the tokenizer was loaded here."""
    if path.is_file():
        settings = json.loads(path.read_text(encoding="utf-8"))
        write_json(path, {k: v for k, v in settings.items() if k not in {"is_local", "local_files_only"}})


def _move(source: Path, target: Path, names: list[str]) -> None:
    """Move the files to their place, the manifest last, so that a folder with a manifest is never a mixture."""
    if not target.exists():
        source.chmod(0o755)
        for path in source.iterdir():
            path.chmod(0o644)
        source.rename(target)
        return
    stale: list[str] = []
    if (target / MANIFEST).is_file():
        stale = read_manifest(target).get("files", [])
        (target / MANIFEST).unlink()
    for name in [*names, MANIFEST]:
        (source / name).chmod(0o644)
        (source / name).replace(target / name)
    for name in set(stale) - set(names):
        (target / Path(name).name).unlink(missing_ok=True)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Parse `kvc.json`.

    Raises:
        UserError: If it is missing, broken, or of a later version of kvc.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise UserError(f"{folder} holds no {MANIFEST}, so it is not an exported method")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not valid JSON (line {error.lineno}): {error.msg}") from error
    if not isinstance(manifest, dict) or not isinstance(manifest.get("model"), dict):
        raise UserError(f"{path} lacks the key 'model'")
    if manifest.get("schema") != SCHEMA:
        raise UserError(f"{path}: schema {manifest.get('schema')} is not the one this kvc reads ({SCHEMA})")
    return manifest


def model_config(manifest: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The configuration to build the exported method with; a base model in the export is found in `folder`."""
    model: dict[str, Any] = json.loads(json.dumps(manifest["model"]))
    backbone = (model.get("init_args") or {}).get("backbone") or {}
    if "trained_from" in manifest and backbone.get("pretrained") == HERE:
        # An explicit path, so that a relative one with a single slash is not taken for a Hub id.
        backbone["pretrained"] = str(folder.resolve())
    return model


def load_export(folder: Path) -> Method:
    """Build the method of an exported folder and fill in its tensors.

    Raises:
        UserError: If the folder is incomplete, or its base model is not the one it was trained on.
    """
    from kvc.core.build import build_model

    manifest = read_manifest(folder)
    method = build_model(model_config(manifest, folder))
    if not isinstance(method, Method):
        raise UserError(f"{folder / MANIFEST}: {type(method).__name__} is not a trained method")
    base = manifest.get("base_model") or {}
    here = method.base_identity().get("hash", "")
    if base.get("hash", here) != here:
        raise UserError(f"{folder} was trained on another base model (hash {base['hash']}, here {here})")
    read_export(method, folder)
    return method


def read_export(method: Method, folder: Path) -> None:
    """Put the tensors of an export into a method built from its `model_config`.

    Raises:
        UserError: If a file is missing or broken, or tensors do not fit the method.
    """
    parts = parts_of(method)
    if parts.adapted is not None:
        from peft import set_peft_model_state_dict

        adapter = _read(folder / ADAPTER)
        _check(folder / ADAPTER, parts.adapter, adapter)
        set_peft_model_state_dict(parts.adapted, adapter)
    extra = _read(folder / TENSORS) if parts.extra else {}
    _check(folder / TENSORS, parts.extra, extra)
    method.load_state_dict(extra, strict=False)


def _read(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except FileNotFoundError:
        raise UserError(f"the export lacks {path}") from None
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} is not a readable safetensors file: {error}") from error


def _check(path: Path, wanted: dict[str, torch.Tensor], found: dict[str, torch.Tensor]) -> None:
    """Refuse missing, foreign and misshapen tensors: none may be skipped silently."""
    if different := sorted(wanted.keys() ^ found.keys()):
        what = "lacks" if different[0] in wanted else "holds a tensor the method does not have:"
        raise UserError(f"{path} {what} {different[0]}")
    for name, tensor in found.items():
        if tensor.shape != wanted[name].shape:
            raise UserError(f"{path}: {name} has shape {[*tensor.shape]}, the method needs {[*wanted[name].shape]}")


def _is_peft(module: nn.Module) -> bool:
    """Whether PEFT wraps this module; asked by attribute, because importing PEFT takes a second."""
    return hasattr(module, "peft_config") and hasattr(module, "active_adapter") and hasattr(module, "get_base_model")
