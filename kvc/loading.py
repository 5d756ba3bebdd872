"""A trained method from a run folder, an exported folder or the Hub, ready to use."""

import json
import os
import re
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvc.errors import UserError

if TYPE_CHECKING:
    from kvc.core.method import Method
    from kvc.core.module import KvcModule
    from kvc.runs import RunFolder

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
PUBLISHED = {
    "summary_length": "kvc.methods.autocompressor.AutoCompressorModel",
    "sum_token_id": "kvc.methods.autocompressor.AutoCompressorModel",
}
"""Keys of a `config.json` that tell a checkpoint published by others, and what loads it by `from_pretrained`."""


def load(source: str | os.PathLike[str], device: str = "cpu") -> Any:
    """Load a trained method (or an evaluation, which needs no training).

    Args:
        source: A run folder, a folder written by `python -m kvc export`, a folder in the layout of the published
            AutoCompressors, or a Hub id `owner/name` of one.
        device: Where to put it, e.g. `cpu` or `cuda:0`.

    Returns:
        The method in eval mode; of a published checkpoint its model.

    Raises:
        UserError: If there is no method at `source`, it was trained on another base model, or files are broken.
    """
    from transformers.utils import logging

    from kvc.core.export import MANIFEST, load_export
    from kvc.runs import CONFIG, RunFolder

    logging.disable_progress_bar()
    folder = Path(source).expanduser()
    if not folder.exists() and looks_like_hub_id(str(source)):
        folder = _download(str(source))
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder} to load a method from")
    if (folder / MANIFEST).is_file():
        model: KvcModule = load_export(folder)
    elif (folder / CONFIG).is_file():
        model = load_run(RunFolder(folder))
    elif (path := _published(folder)) is not None:
        module, _, name = path.rpartition(".")
        model = getattr(import_module(module), name).from_pretrained(folder)
    else:
        raise UserError(f"{folder} holds neither {MANIFEST} (an export) nor {CONFIG} (a run folder)")
    return _to(model, device).eval()


def _published(folder: Path) -> str | None:
    """Import path of the class that loads a folder of others."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return next((path for key, path in PUBLISHED.items() if isinstance(config, dict) and key in config), None)


def load_run(run: "RunFolder") -> "KvcModule":
    """Build the model of a run and give a method the weights of its best checkpoint.

    Raises:
        UserError: If the run has no checkpoint, or one that does not fit.
    """
    from kvc.core.build import build_model
    from kvc.core.checkpoint_io import read_checkpoint
    from kvc.core.method import Method

    config = run.read_config()
    if not isinstance(config.get("model"), dict):
        raise UserError(f"{run.config} has no key 'model'")
    trained = run.path.resolve().parent.parent
    if run.path.resolve().parent.name == "eval" and (trained / "checkpoints").is_dir():
        raise UserError(f"{run.path} is an evaluation: load the run {trained}")
    model = build_model(config["model"])
    if isinstance(model, Method):
        path = run.best()
        checkpoint = read_checkpoint(path)
        model.check_checkpoint(checkpoint, str(path))
        _fill(model, checkpoint["state_dict"], path)
    return model


def looks_like_hub_id(text: str) -> bool:
    """Whether `text` is `owner/name` and nothing on this disk."""
    return HUB_ID.fullmatch(text) is not None and not Path(text).exists() and not Path(text).parent.exists()


def hub_failure(action: str, error: Exception) -> UserError:
    """One sentence for whatever the Hub client raised; never with a token or an address in it."""
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    if os.environ.get("HF_HUB_OFFLINE", "0") not in {"", "0"} or isinstance(error, OfflineModeIsEnabled):
        reason = "the Hub is switched off (HF_HUB_OFFLINE is set)"
    elif isinstance(error, HfHubHTTPError):
        status = getattr(error.response, "status_code", None)
        named = {401: "no valid token (set HF_TOKEN)", 403: "the token may not do this", 404: "it does not exist"}
        reason = named.get(status or 0, f"the Hub answered {status}")
    elif isinstance(error, LocalEntryNotFoundError | OSError):
        reason = "the Hub cannot be reached"
    else:
        reason = type(error).__name__
    return UserError(f"{action}: {reason}")


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name))
    except Exception as error:  # the Hub client raises from four libraries
        raise hub_failure(f"cannot fetch '{name}' (no such folder here, and from the Hub)", error) from error


def _fill(method: "Method", state: dict[str, Any], path: Path) -> None:
    """Load every tensor or say which one does not fit."""
    try:
        unexpected = method.load_state_dict(state, strict=False).unexpected_keys
    except RuntimeError as error:
        raise UserError(f"{path} does not fit the model: {json.dumps(str(error).splitlines()[-1].strip())}") from error
    if unexpected:
        raise UserError(f"{path} holds a tensor that {type(method).__name__} does not have: {unexpected[0]}")


def _to(model: "KvcModule", device: str) -> "KvcModule":
    try:
        return model.to(device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device: cannot use '{device}': {str(error).splitlines()[0]}") from error
