"""kvc: train, run and compare context and KV-cache compression for language models."""

from typing import Any

from kvc.errors import UserError

__all__ = ["UserError", "load"]
__version__ = "0.1.0"


def load(source: str, device: str = "cpu") -> Any:
    """Load a trained method, ready to use.

    Args:
        source: A run folder, a folder written by `python -m kvc export`, or a Hub id.
        device: Where to put it.

    Returns:
        The method in eval mode.

    Raises:
        UserError: If there is no method at `source`.

    Example:
        >>> import kvc
        >>> method = kvc.load("runs/demo")  # doctest: +SKIP
    """
    from kvc.loading import load as load_

    return load_(source, device)
