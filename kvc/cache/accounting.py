"""How much a memory costs: rows, and bytes that are really held."""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from transformers.cache_utils import Cache


def storage_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the distinct storages behind tensors: a view keeps all of its storage alive, and shares it."""
    storages = {}
    # Layers share most of their small tensors, and asking each for its storage is what takes time.
    for tensor in {id(tensor): tensor for tensor in tensors}.values():
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


class Usage:
    """Rows and bytes of a memory over time, by row of the batch.

    Bytes of a sample are its share of the batch: padded slots are held, so they count.
    """

    def __init__(self) -> None:
        self._log: list[tuple[Sequence[int], Sequence[float], int]] = []
        self._sums: dict[int, dict[str, float]] | None = None

    def record(self, rows: Sequence[int], tokens: Sequence[float], held: int) -> None:
        """Note the present state; the sequences must not change afterwards.

        Args:
            rows: Rows of the batch that are in memory, as they are numbered at the beginning.
            tokens: Rows of the cache that each of them keeps, the mean over layers and KV heads.
            held: Bytes of the whole memory.
        """
        self._log.append((rows, tokens, held))
        self._sums = None

    def summary(self, row: int = 0) -> dict[str, float]:
        """Peak, mean and final use of one row of the batch, over the steps at which it was in memory.

        Returns:
            `kv_tokens_*` (rows per layer and KV head) and `kv_bytes_*`, each `peak`, `mean` and `final`.

        Raises:
            ValueError: If nothing was recorded for the row.
        """
        if self._sums is None:
            self._sums = self._summarize()
        if row not in self._sums:
            raise ValueError(f"nothing was recorded for row {row}")
        return dict(self._sums[row])

    def _summarize(self) -> dict[int, dict[str, float]]:
        rows = np.concatenate([np.asarray(rows, dtype=int) for rows, _, _ in self._log] or [np.zeros(0, int)])
        tokens = np.concatenate([np.asarray(tokens, dtype=float) for _, tokens, _ in self._log] or [np.zeros(0)])
        shares = [np.full(len(rows), held / max(len(rows), 1)) for rows, _, held in self._log]
        series = {"kv_tokens": tokens, "kv_bytes": np.concatenate(shares or [np.zeros(0)])}
        found = {}
        for row in np.unique(rows).tolist():
            found[row] = {
                f"{name}_{kind}": float(value)
                for name, values in series.items()
                for kind, value in zip(("peak", "mean", "final"), _facts(values[rows == row]))
            }
        return found


def _facts(values: np.ndarray) -> tuple[float, float, float]:
    return values.max(), values.mean(), values[-1]
