"""A Hugging Face `Cache` that knows the position of every row it keeps.

    memory = KVMemory(model)
    model.generate(ids, **memory.generate_kwargs(ids))     # the plain model's tokens, while nothing is dropped
    memory.keep(layer, indices)                            # the other rows are gone, and so are their bytes
    memory.rotate("compact")                               # those that are left move together
    model.generate(more, **memory.generate_kwargs(more))   # goes on at the right positions
    memory.fork()                                          # another continuation of the same rows

After `generate` the memory holds every token but the last, which no forward has seen: the next input begins with it.

Shapes: B batch, H KV heads, N slots, D head dimension, T new tokens, K kept slots; see `kvc.cache.rows`.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from kvc.cache.accounting import storage_bytes
from kvc.cache.codec import Storage, codec_of
from kvc.cache.hooks import attach
from kvc.cache.layer import MemoryLayer
from kvc.cache.positioned import PositionedCache
from kvc.cache.rotation import Mode, Rotation, compacted, placed
from kvc.cache.rows import Span
from kvc.errors import UserError


@dataclass(frozen=True)
class Rotated:
    """The last rotation of a memory.

    Attributes:
        mode: `keep` if there was none.
        prefix: Rows at positions below it stayed.
        target_end: Position after the block's last row, for `place`.
    """

    mode: Mode = "keep"
    prefix: int = 0
    target_end: int | None = None


class KVMemory(PositionedCache):
    """Keys, values and positions of every layer of one model.

    Args:
        model: The model whose memory it is; it gets hooks, once (see `kvc.cache.hooks`).
        storage: `full` keeps rows as they are, `int8` and `int4` code them.
        group: Channels that share a scale, for coded storage.

    Raises:
        UserError: If the model's layers keep anything but keys and values of attention.
    """

    def __init__(self, model: PreTrainedModel, storage: Storage = "full", group: int = 64) -> None:
        config: Any = model.config.get_text_config(decoder=True)
        windows = _windows(model, config)
        attach(model)
        self.codec = codec_of(storage, group)
        heads = config.num_attention_heads
        groups = heads // (getattr(config, "num_key_value_heads", None) or heads)
        super().__init__([MemoryLayer(self.codec) for _ in windows], windows, groups)
        self._rotation = Rotation(model)
        self.rotated = Rotated()

    def __repr__(self) -> str:
        return f"KVMemory(layers={len(self.layers)}, slots={self.layers[0].length}, storage={self.codec.storage})"

    @property
    def tokens(self) -> torch.Tensor:
        """Rows kept, float `[B]`: mean over layers and KV heads.

        Raises:
            ValueError: If the memory is empty: it has no batch.
        """
        assert len(self.next_position)
        return torch.stack([layer.counts.float().mean(-1) for layer in self.layers]).mean(0)

    @property
    def bytes(self) -> int:
        """Bytes of everything held, positions included: the distinct storages of the live tensors."""
        return storage_bytes(tensor for layer in self.layers for tensor in layer.tensors())

    def keep(self, layer: int, indices: torch.Tensor) -> None:
        """Keep only the given rows of a layer, and free the others.

        Args:
            layer: Which layer.
            indices: Slots int64 `[B, H, K]` in their new order, -1 for none; those move to the left end.
        """
        self.layers[layer].keep(indices)
        self._changed()

    def evict(self, layer: int, batch: torch.Tensor, indices: torch.Tensor) -> None:
        """Keep only the slots `[R, H, K]` of a layer in some rows `[R]` of the batch; see `Rows.evict`."""
        self.layers[layer].evict(batch, indices)
        self._changed()

    def append(self, layer: int, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor) -> None:
        """Add rows that no forward made after the last slot of a layer.

        Args:
            layer: Which layer.
            keys: `[B, H, T, D]`, rotated to `positions`.
            values: `[B, H, T, D]`.
            positions: `[B, T]` or `[B, H, T]`, -1 where there is no row. The next position moves behind them.
        """
        self.layers[layer].append(keys, values, positions)
        self._behind(positions)

    def replace(
        self, layer: int, span: Span, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor
    ) -> None:
        """Put other rows, of any number, in the place of the slots `span` of a layer; see `append`."""
        self.layers[layer].replace(span, keys, values, positions)
        self._behind(positions)

    def merge(self, layer: int, source: Span, target: Span, weight: float | torch.Tensor) -> None:
        """Average rows of a layer into others and drop them; see `Rows.merge`."""
        self.layers[layer].merge(source, target, weight)
        self._changed()

    def extend(self, other: "KVMemory") -> None:
        """Add all rows of another memory of the same model behind the own ones, at the positions they have.

        Rotate one of them first where positions should not overlap. The next position is the later of the two.

        Args:
            other: A memory of the same batch, or of one row.

        Raises:
            ValueError: If layers or batch do not fit.
        """
        if len(other.layers) != len(self.layers):
            raise ValueError(f"a memory of {len(other.layers)} layers cannot extend one of {len(self.layers)}")
        if other._next is None:
            return
        if self._next is not None and len(other._next) != len(self._next):
            if len(other._next) != 1:
                raise ValueError(f"a memory of {len(other._next)} rows cannot extend one of {len(self._next)}")
            other = other.fork()
            other.batch_repeat_interleave(len(self._next))
        for own, layer in zip(self.layers, other.layers):
            own.extend(layer)
        self._next = other.next_position if self._next is None else torch.maximum(self._next, other.next_position)
        self._changed()

    def rotate(self, mode: Mode, prefix: int = 0, target_end: int | None = None) -> None:
        """Sort rows by time and move them to positions without gaps, in every layer and head.

        Args:
            mode: `keep` leaves everything as it is. `compact` puts the rows right behind the prefix, and the next
                token behind the longest block. `place` puts them so that every block ends before `target_end`, which
                is the next position.
            prefix: Rows at positions below it stay where they are.
            target_end: For `place`: position after the block.

        Raises:
            UserError: If the block does not fit, the settings do not fit together, or the keys of the model cannot
                be moved exactly. The memory is then as it was.
        """
        _check_rotation(mode, prefix, target_end)
        if mode == "keep" or self._next is None:
            return
        self._rotation.check()
        self.settle()
        orders = [layer.seen.argsort(dim=-1, stable=True) for layer in self.layers]
        before = [layer.seen.gather(2, order).long() for layer, order in zip(self.layers, orders)]
        if target_end is None:
            after = [compacted(old, prefix) for old in before]
        else:
            most = max([0, *(int((old >= prefix).sum(-1).max()) for old in before if old.numel())])
            if most > target_end - prefix:
                raise UserError(
                    f"target_end: {most} rows do not fit between the prefix ({prefix}) and {target_end}, "
                    f"it must be at least {prefix + most}"
                )
            after = [placed(old, prefix, target_end) for old in before]
        for index, (layer, order, old, new) in enumerate(zip(self.layers, orders, before, after)):
            layer.keep(order)
            layer.move(self._rotation.move(index, layer.keys, old, new), new)
        if target_end is None:
            self._next = torch.cat([new.flatten(1) for new in after], dim=1).amax(1) + 1
        else:
            self.next_position = target_end
        self.rotated = Rotated(mode, prefix, target_end)

    def fork(self) -> "KVMemory":
        """A memory of its own that shares the tensors of this one, until either changes."""
        other = copy.copy(self)
        other.layers = [layer.fork() for layer in self.layers]
        return other

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.rotated = Rotated()

    def _behind(self, positions: torch.Tensor) -> None:
        """The next position is behind `positions`, and never before what it was."""
        before = self._next
        self._advance(positions)
        if before is not None and self._next is not None:
            self._next = torch.maximum(self._next, before)
        self._changed()


def _windows(model: PreTrainedModel, config: Any) -> list[int | None]:
    """How far the tokens of each layer look back; None for all the way.

    Raises:
        UserError: If a layer keeps anything but the keys and values of its own attention.
    """
    window = getattr(config, "sliding_window", None)
    count = config.num_hidden_layers
    kinds = getattr(config, "layer_types", None) or ["sliding_attention" if window else "full_attention"] * count
    strange = sorted(set(kinds) - {"full_attention", "sliding_attention"})
    if model.config.is_encoder_decoder:
        strange = ["cross attention"]
    if getattr(config, "num_kv_shared_layers", 0):
        strange = ["keys and values shared by layers"]
    if getattr(config, "attention_chunk_size", None):
        strange = ["attention in chunks"]
    if strange:
        raise UserError(f"{type(model).__name__} has {strange[0].replace('_', ' ')}, which a KV memory cannot hold")
    return [window if kind == "sliding_attention" else None for kind in kinds]


def _check_rotation(mode: str, prefix: int, target_end: int | None) -> None:
    if mode not in {"keep", "compact", "place"}:
        raise UserError(f"rotation: '{mode}' is not one of keep, compact, place")
    if (mode == "place") != (target_end is not None):
        raise UserError(f"target_end {'is needed by' if mode == 'place' else 'has no effect with'} the mode '{mode}'")
    if prefix < 0:
        raise UserError(f"prefix: {prefix} is negative")
