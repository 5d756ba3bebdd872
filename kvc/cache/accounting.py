"""How much a memory costs: rows, and bytes that are really held."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from transformers.cache_utils import Cache


def storage_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the distinct storages behind tensors: a view keeps all of its storage alive, and shares it."""
    storages = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        storages[tensor.device, storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def cache_bytes(cache: Cache) -> int:
    """Bytes of any cache of transformers, a memory's or a plain one's, by the same rule."""
    own = getattr(cache, "bytes", None)
    if isinstance(own, int):
        return own
    held = (getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values"))
    return storage_bytes(tensor for tensor in held if isinstance(tensor, torch.Tensor))


class Measured(Protocol):
    """What is recorded."""

    @property
    def tokens(self) -> torch.Tensor:
        """Rows kept, `[B]`: mean over layers and KV heads."""
        ...

    @property
    def bytes(self) -> int:
        """Bytes held."""
        ...


@dataclass
class Usage:
    """Rows and bytes of a memory over time, one entry a step.

    Bytes of a sample are its share of the batch: padded slots are held, so they count.
    """

    _tokens: list[torch.Tensor] = field(default_factory=list)
    _bytes: list[float] = field(default_factory=list)
    _active: list[torch.Tensor | None] = field(default_factory=list)

    def record(self, memory: Measured, active: torch.Tensor | None = None) -> None:
        """Note the present state.

        Args:
            memory: What to measure.
            active: bool `[B]`, rows of the batch that still count; None for all.
        """
        tokens = memory.tokens
        self._tokens.append(tokens)
        self._bytes.append(memory.bytes / len(tokens))
        self._active.append(None if active is None else active.clone())

    def summary(self, row: int = 0) -> dict[str, Any]:
        """Peak, mean and final use of one row of the batch, over the steps at which it was active.

        Returns:
            `kv_tokens_*` (rows per layer and KV head) and `kv_bytes_*`, each `peak`, `mean` and `final`.

        Raises:
            ValueError: If nothing was recorded for the row.
        """
        steps = [i for i, active in enumerate(self._active) if active is None or bool(active[row])]
        if not steps:
            raise ValueError(f"nothing was recorded for row {row}")
        result: dict[str, Any] = {}
        series = {
            "kv_tokens": [float(self._tokens[i][row]) for i in steps],
            "kv_bytes": [self._bytes[i] for i in steps],
        }
        for name, values in series.items():
            result[f"{name}_peak"] = max(values)
            result[f"{name}_mean"] = sum(values) / len(values)
            result[f"{name}_final"] = values[-1]
        return result
