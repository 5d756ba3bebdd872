"""How much a memory costs: rows, and bytes that are really held."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from transformers.cache_utils import Cache

PEAK, SUM, FINAL = range(3)


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


@dataclass
class Usage:
    """Rows and bytes of a memory over time, by row of the batch.

    Bytes of a sample are its share of the batch: padded slots are held, so they count.
    """

    _steps: np.ndarray = field(default_factory=lambda: np.zeros(0))
    _series: dict[str, np.ndarray] = field(default_factory=dict)

    def record(self, rows: Sequence[int], tokens: Sequence[float], held: int) -> None:
        """Note the present state.

        Args:
            rows: Rows of the batch that are in memory, as they are numbered at the beginning.
            tokens: Rows of the cache that each of them keeps, the mean over layers and KV heads.
            held: Bytes of the whole memory.
        """
        at = np.asarray(rows)
        self._grow(int(at.max()) + 1)
        self._steps[at] += 1
        for name, values in (("kv_tokens", np.asarray(tokens, dtype=float)), ("kv_bytes", held / len(rows))):
            series = self._series[name]
            series[PEAK, at] = np.maximum(series[PEAK, at], values)
            series[SUM, at] += values
            series[FINAL, at] = values

    def summary(self, row: int = 0) -> dict[str, float]:
        """Peak, mean and final use of one row of the batch, over the steps at which it was in memory.

        Returns:
            `kv_tokens_*` (rows per layer and KV head) and `kv_bytes_*`, each `peak`, `mean` and `final`.

        Raises:
            ValueError: If nothing was recorded for the row.
        """
        if row >= len(self._steps) or self._steps[row] == 0:
            raise ValueError(f"nothing was recorded for row {row}")
        result: dict[str, float] = {}
        for name, series in self._series.items():
            result[f"{name}_peak"] = float(series[PEAK, row])
            result[f"{name}_mean"] = float(series[SUM, row] / self._steps[row])
            result[f"{name}_final"] = float(series[FINAL, row])
        return result

    def _grow(self, rows: int) -> None:
        more = rows - len(self._steps)
        if more > 0:
            self._steps = np.append(self._steps, np.zeros(more))
            empty = np.zeros((3, 0))
            for name in ("kv_tokens", "kv_bytes"):
                self._series[name] = np.append(self._series.get(name, empty), np.zeros((3, more)), axis=1)
