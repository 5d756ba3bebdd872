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
        return read_checkpoint(Path(path))


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a trainer checkpoint on the CPU.

    Raises:
        UserError: If the file is missing, broken or holds pickled objects.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"there is no checkpoint {path}") from None
    except Exception as error:  # torch raises whatever its zip and pickle readers raise
        raise UserError(f"{path} is not a readable checkpoint: {str(error).splitlines()[0][:200]}") from error
