"""What the hooks on a model (`kvc.cache.hooks`) ask of a memory.

Shapes: B batch, T new tokens, N slots, H KV heads or query heads.
"""

from abc import abstractmethod
from typing import Any

import torch
from transformers.cache_utils import Cache

from kvc.cache.masks import Incoming
from kvc.core.attention import Tap


class HookedCache(Cache):
    """A cache that decides about positions and masks of the forwards that are run on it.

    Args:
        layers: One for each layer of the model.
        windows: Positions that a token of each layer looks back; None for all.
        groups: Query heads per KV head.
    """

    def __init__(self, layers: list[Any], windows: list[int | None], groups: int) -> None:
        super().__init__(layers=layers)
        self._windows, self._groups = windows, groups
        self.layered = False
        """Whether the running forward needs a mask for each layer."""
        self.tap: Tap | None = None
        """Sees, and may exchange, the queries, keys and values of every forward; see `kvc.core.attention`."""

    @property
    @abstractmethod
    def incoming(self) -> Incoming:
        """The tokens of the running forward."""

    @abstractmethod
    def begin(
        self, batch: int, new: int, mask: torch.Tensor | None, positions: torch.Tensor | None, device: torch.device
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """A forward of `[B, T]` tokens begins; returns the mask and the position ids `[B, T]` to run it with."""

    @abstractmethod
    def mask(self, layer: int, attention: str, dtype: torch.dtype) -> torch.Tensor | None:
        """Mask of one layer in the running forward, in the form that an attention kernel takes."""

    @abstractmethod
    def end(self) -> None:
        """The forward has ended."""
