"""Random state: where it is kept, how a checkpoint carries it, how a step draws from it."""

import random
from typing import Any

import numpy as np
import torch

DEFAULT_SEED = 42


def capture() -> dict[str, Any]:
    """The state of every global generator as plain tensors and numbers, safe for `weights_only` loading.

    Returns:
        `torch`: uint8 tensor; `cuda`: list of uint8 tensors, one a visible device; `python` and `numpy`: nested lists.
    """
    version, words, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state()  # noqa: NPY002 - libraries still draw from it
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": [version, list(words), gauss],
        "numpy": [torch.from_numpy(np.asarray(keys, dtype=np.int64)), int(position), int(has_gauss), float(cached)],
    }


def restore(state: dict[str, Any]) -> None:
    """Put back what `capture` returned."""
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] and torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), position, has_gauss, cached))  # noqa: NPY002


def generator(*key: int) -> torch.Generator:
    """A CPU generator that depends on nothing but `key`, e.g. `(seed, step)` or `(seed, epoch, record)`."""
    sequence = np.random.SeedSequence([int(k) & 0xFFFFFFFF for k in key])
    return torch.Generator().manual_seed(int(sequence.generate_state(1, np.uint64)[0]) >> 1)
