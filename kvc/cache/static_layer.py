"""The rows of one layer in buffers of a fixed size, written in place.

Shapes: B batch, H KV heads, C slots of the buffer, N slots in use, D head dimension, K kept slots.
"""

from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin

from kvc.cache.codec import Full
from kvc.cache.rows import Rows


class StaticLayer(CacheLayerMixin):
    """A copy of the rows of a layer, with room for more behind them.

    The slots in use are the first N, with the rows at their right end. What a forward does to the layer is made of
    operations on tensors only, in place; N on the host (`length`) is counted by whoever runs the forwards.

    Args:
        rows: What to copy; stored in full.
        capacity: Slots of the buffers, C; at least those of `rows`.
    """

    is_compileable = True
    is_sliding = False
    is_croppable = False
    supports_early_init = False
    is_initialized = True

    def __init__(self, rows: Rows, capacity: int) -> None:
        keys, values, mass = rows.keys, rows.values, rows.mass
        batch, heads = keys.shape[:2]
        self.device, self.dtype, self.batch_size, self.capacity = keys.device, keys.dtype, batch, capacity
        # Zeros: an unused slot has no weight, but no weight times nan would still be nan.
        self._keys = keys.new_zeros(batch, heads, capacity, keys.shape[-1])
        self._values = values.new_zeros(batch, heads, capacity, values.shape[-1])
        self._seen = torch.empty(batch, heads, capacity, dtype=torch.int32, device=self.device)
        self._mass = None if mass is None else mass.new_empty(batch, heads, capacity)
        self._cursor = torch.zeros(1, dtype=torch.int64, device=self.device)
        self._columns = torch.arange(capacity, device=self.device)
        self._fill(rows)

    # What is stored

    @property
    def keys(self) -> torch.Tensor:
        """Keys `[B, H, N, D]`, a view."""
        return self._keys[:, :, : self.length]

    @property
    def values(self) -> torch.Tensor:
        """Values `[B, H, N, D]`, a view."""
        return self._values[:, :, : self.length]

    @property
    def positions(self) -> torch.Tensor:
        """Position of every row, int64 `[B, H, N]`; -1 where the slot is empty."""
        return self._seen[..., : self.length].long()

    @property
    def mass(self) -> torch.Tensor | None:
        """Attention that every row has received, float32 `[B, H, N]`, a view; None where nobody asked for it."""
        return None if self._mass is None else self._mass[..., : self.length]

    @property
    def counts(self) -> torch.Tensor:
        """Number of rows in each row of the batch, `[B, H]`."""
        return (self._seen[..., : self.length] >= 0).sum(-1)

    def tensors(self) -> list[torch.Tensor]:
        """The buffers."""
        return [part for part in (self._keys, self._values, self._seen, self._mass) if part is not None]

    def rows(self, padded: bool = False) -> Rows:
        """The slots in use as ordinary rows, which share the buffers until they change.

        Args:
            padded: Whether empty slots may be anywhere.
        """
        view, mass = Rows(Full()), self.mass
        view.weighed = mass is not None
        view.set((self.keys,), (self.values,), self._seen[..., : self.length], self.dtype, padded, mass)
        view.padded |= self.padded
        return view

    # In a forward

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write one row `[B, H, 1, D]` behind the last slot.

        Args:
            key_states: `[B, H, 1, D]`.
            value_states: `[B, H, 1, D]`.
            *args: None.
            **kwargs: `positions` int32 `[B]`, -1 where the slot stays empty.

        Returns:
            The whole buffers `[B, H, C, D]`.
        """
        self._keys.index_copy_(2, self._cursor, key_states)
        self._values.index_copy_(2, self._cursor, value_states)
        noted = kwargs["positions"][:, None, None].expand(-1, self._seen.shape[1], -1)
        self._seen.index_copy_(2, self._cursor, noted)
        return self._keys, self._values

    def visible(self, positions: torch.Tensor, window: int | None) -> torch.Tensor:
        """Slots that the next token sees, its own included: bool `[B, H, 1, C]`.

        Args:
            positions: Its position, int64 `[B]`.
            window: Positions that it looks back, itself included; None for all.
        """
        seen = self._seen >= 0
        if window is not None:
            seen = seen & (positions[:, None, None] - self._seen < window)
        # A row without any visible slot would be nan.
        return (seen | (self._columns == self._cursor))[:, :, None]

    def receive(self, attention: torch.Tensor) -> None:
        """Add the attention `[B, H, C]` that the slots of the running forward received."""
        assert self._mass is not None, "nobody asked for attention before the rows became static"
        self._mass.add_(attention)

    def advance(self) -> None:
        """The next forward writes to the next slot."""
        self._cursor.add_(1)

    # Between forwards

    def keep(self, indices: torch.Tensor) -> None:
        """Keep only the given rows, at the front of the same buffers; see `Rows.keep`."""
        rows = self.rows()
        rows.keep(indices)
        self._fill(rows)

    def evict(self, batch: torch.Tensor, indices: torch.Tensor) -> None:
        """Keep only the given rows in some rows of the batch, in the same buffers; see `Rows.evict`."""
        rows = self.rows()
        rows.evict(batch, indices)
        self._fill(rows)

    def vacate(self, batch: torch.Tensor) -> None:
        """Drop all rows of these rows of the batch."""
        self._seen[batch] = -1
        rows = self.rows(padded=True)
        # The others move to where the longest was, or their bound would not hold.
        self._fill(rows)

    def _fill(self, rows: Rows) -> None:
        self.length, self.padded = rows.length, rows.padded
        self._keys[:, :, : self.length] = rows.keys
        self._values[:, :, : self.length] = rows.values
        self._seen[..., : self.length] = rows.seen
        self._seen[..., self.length :] = -1
        mass = rows.mass
        if self._mass is not None and mass is not None:
            self._mass[..., : self.length] = mass
            self._mass[..., self.length :] = 0
        self._cursor.fill_(self.length)

    # What transformers asks of a layer

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to prepare."""

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys that the next forward attends to, and the offset of the first."""
        return self.capacity, 0

    def get_seq_length(self) -> torch.Tensor:
        """Number of slots in use; a tensor, because a number would tie compiled code to its value."""
        return self._cursor[0]

    def get_max_length(self) -> int:
        """Slots of the buffers."""
        return self.capacity
