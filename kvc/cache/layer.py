"""One layer of memory as transformers wants it.

Shapes: B batch, H KV heads, N slots, D head dimension, T new tokens.
"""

from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin

from kvc.cache.rows import Rows


class MemoryLayer(Rows, CacheLayerMixin):
    """Rows of one layer, with the methods of a cache layer.

    Args:
        codec: How rows are stored.
    """

    is_croppable = True
    is_sliding = False
    supports_early_init = False

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to prepare."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append the keys and values of one forward.

        Args:
            key_states: `[B, H, T, D]`.
            value_states: `[B, H, T, D]`.
            *args: None.
            **kwargs: `positions` `[B, T]`, -1 for padding, and `padded`, whether there is any.

        Returns:
            All keys and values `[B, H, N + T, D]`, for the attention of this forward.
        """
        self.append(key_states, value_states, kwargs["positions"], kwargs["padded"])
        keys, values = self.rows
        return self.codec.decode(keys, self.dtype), self.codec.decode(values, self.dtype)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys that the next forward attends to, and the offset of the first."""
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        """Number of slots."""
        return self.length

    def get_max_length(self) -> int:
        """No limit."""
        return -1

    def reset(self) -> None:
        """Forget everything."""
        self.clear()

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last slots, as many as the negative number says."""
        if tokens_to_remove > 0:
            raise ValueError("crop takes a negative number, the number of slots to drop")
        if tokens_to_remove and self.is_initialized:
            self.drop(max(0, self.length + tokens_to_remove), self.length)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Rows of the batch in another order."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row of the batch several times."""
        if self.is_initialized:
            rows = torch.arange(self.batch_size, device=self.device)
            self.batch_select_indices(rows.repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Only the given rows of the batch."""
        if self.is_initialized:
            self.select(indices.to(self.device))
