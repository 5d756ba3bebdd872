"""How trainer checkpoints reach the disk: atomically, and never through unpickling."""

from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from kvc.core.files import atomic
from kvc.errors import UserError


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes to a temporary name and renames; reads with `weights_only=True` whatever the caller asks for."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Save so that a kill at any moment leaves the old file or the new one."""
        with atomic(path) as temporary:
            torch.save(checkpoint, temporary)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = True) -> dict[str, Any]:
        """Load tensors and plain values.

        Raises:
            UserError: If the file is missing, broken or holds pickled objects.
        """
        path = Path(path)
        # Under this name Lightning hands the bare weights of forked ranks back to their parent.
        return _read(path) if path.name == ".temp.ckpt" else read_checkpoint(path)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a trainer checkpoint on the CPU.

    Raises:
        UserError: If the file is missing, broken, foreign or holds pickled objects.
    """
    checkpoint = _read(path)
    if not isinstance(checkpoint, dict) or "kvc" not in checkpoint:
        raise UserError(f"{path} was not written by kvc")
    return checkpoint


def _read(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"there is no checkpoint {path}") from None
    except Exception as error:  # torch raises whatever its zip and pickle readers raise
        if "unsupported global" in str(error).lower():
            raise UserError(f"{path} holds pickled objects, which are never loaded: they could run code") from error
        reason = " ".join(str(error).split()).split(". ")[0][:120]
        # Of some errors the text is empty, or a number.
        raise UserError(f"{path} is broken, or no checkpoint{f': {reason}' if ' ' in reason else ''}") from error
