"""What a compressor must share with another one for a memory of the one to mean the same to the other."""

import hashlib
from pathlib import Path
from typing import Any

import torch

from kvc.cache.fingerprint import display_name, fingerprint
from kvc.core.masks import is_merged
from kvc.errors import UserError
from kvc.methods.ccm.parallel import Compressor


def identity(compressor: Compressor) -> dict[str, Any]:
    """Base model, settings and trained weights, as JSON.

    Returns:
        `base` and `adapter`, hashes, and `settings`.
    """
    rule = compressor.merge
    return {
        "base": fingerprint(_base(compressor), adapters=False),
        "settings": {
            "kind": compressor.kind,
            "slots": compressor.tokens.slots,
            "positions": compressor.positions,
            "cond_lora": compressor.conditional,
            "merge": {"rule": type(rule).__name__, **vars(rule)} if is_merged(compressor.kind) else None,
        },
        "adapter": _adapter(compressor),
    }


def check(path: Path, theirs: dict[str, Any], compressor: Compressor) -> None:
    """Compare the identity in a file with that of a compressor.

    Args:
        path: The file.
        theirs: What `identity` gave when it was written.
        compressor: Who is to read it.

    Raises:
        UserError: If they differ; says in what.
    """
    ours = identity(compressor)
    if theirs["base"] != ours["base"]:
        name = display_name(_base(compressor))
        raise UserError(f"{path}: a session with another base model than '{name}' as it is loaded here")
    for key, own in ours["settings"].items():
        if theirs["settings"].get(key) != own:
            raise UserError(f"{path}: {key}: the session was made with {theirs['settings'].get(key)}, here it is {own}")
    if theirs["adapter"] != ours["adapter"]:
        raise UserError(f"{path}: a session with another adapter or other memory tokens than those loaded here")


def _base(compressor: Compressor) -> Any:
    model: Any = compressor.model
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _adapter(compressor: Compressor) -> str:
    """sha256 of all that was trained: LoRA and memory tokens."""
    total = hashlib.sha256()
    trained = {name: value for name, value in compressor.model.named_parameters() if ".lora_" in name}
    for name, value in sorted({**trained, "tokens.table": compressor.tokens.table}.items()):
        total.update(f"{name} {[*value.shape]} {value.dtype}\n".encode())
        total.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()
