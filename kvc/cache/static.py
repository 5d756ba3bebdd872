"""A memory of fixed shapes: what a KV memory becomes for decoding where something bounds its size.

    static = StaticMemory.of(memory, capacity=budget + buffer)     # the rows move; `memory` is empty until then
    logits = step(tokens)                                          # `kvc.generation.static.StaticStep`
    memory = static.to_memory()

Nothing grows: a forward of one token writes into buffers, an eviction moves rows inside them, and addresses and shapes
stay what they were, so a forward can be compiled once, or captured as a CUDA graph.

Shapes: B batch, H KV heads, C slots of a layer's buffers, K kept slots.
"""

from collections.abc import Sequence
from typing import Any, Self

import torch

from kvc.cache.accounting import storage_bytes
from kvc.cache.hooked import HookedCache
from kvc.cache.masks import Incoming, form
from kvc.cache.memory import KVMemory
from kvc.cache.positioned import PositionedCache
from kvc.cache.static_layer import StaticLayer
from kvc.errors import UserError


class StaticMemory(HookedCache):
    """Keys, values and positions of every layer in preallocated buffers; made by `StaticMemory.of`.

    A row of the batch that has ended stays in the batch: its slots are empty, its forwards leave nothing.

    Args:
        memory: The memory whose rows move here.
        capacity: Slots of each layer.

    Raises:
        UserError: If the memory stores its rows in codes.
    """

    layers: list[StaticLayer]

    def __init__(self, memory: KVMemory, capacity: Sequence[int]) -> None:
        check_storage(memory)
        memory.settle()
        for layer, slots in zip(memory.layers, capacity, strict=True):
            if slots < layer.length:
                raise ValueError(f"capacity: {slots} slots do not hold the {layer.length} that are in memory")
        self._next = memory.next_position.clone()
        self._alive = torch.ones_like(self._next)
        self._noted = self._next.to(torch.int32)
        self._any = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=self._next.device)
        self._memory = memory
        layers = []
        for layer, slots in zip(memory.layers, capacity):
            layers.append(StaticLayer(layer, slots))
            # One layer at a time: both forms of the whole memory might not fit.
            layer.clear()
        # The memory's own reset would forget how its rows were rotated.
        PositionedCache.reset(memory)
        super().__init__(layers, memory._windows, memory._groups)
        self.layered = True
        # The buffers never change, and a decode loop asks after every step.
        self._bytes = storage_bytes(tensor for layer in layers for tensor in layer.tensors())

    @classmethod
    def of(cls, memory: KVMemory, capacity: int | Sequence[int]) -> Self:
        """Move the rows of a memory; it is empty until `to_memory` gives them back.

        Args:
            memory: Any that is not empty and stores its rows in full.
            capacity: Slots of every layer, or of each of them.

        Raises:
            UserError: If the memory stores its rows in codes.
            ValueError: If it is empty, or its rows do not fit.
        """
        return cls(memory, [capacity] * len(memory.layers) if isinstance(capacity, int) else capacity)

    def to_memory(self) -> KVMemory:
        """The memory that this one was made of, with the rows as they are now; this one is used up."""
        memory = self._memory
        while self.layers:
            static = self.layers.pop(0)
            layer = memory.layers[len(memory.layers) - len(self.layers) - 1]
            view = static.rows()
            seen = view.seen
            alike = bool((seen == seen[:, :1]).all())
            mass = None if view.mass is None else view.mass.clone()
            keys, values = layer.codec.encode(view.keys), layer.codec.encode(view.values)
            layer.set(keys, values, (seen[:, :1] if alike else seen).clone(), static.dtype, static.padded, mass)
        memory.adopt(self._next)
        return memory

    def __repr__(self) -> str:
        return f"StaticMemory(layers={len(self.layers)}, slots={[layer.capacity for layer in self.layers]})"

    # What is held

    @property
    def tokens(self) -> torch.Tensor:
        """Rows kept, float `[B]`: mean over layers and KV heads."""
        return torch.stack([layer.counts.float().mean(-1) for layer in self.layers]).mean(0)

    @property
    def bytes(self) -> int:
        """Bytes of the buffers, used or not."""
        return self._bytes if self.layers else 0

    @property
    def next_position(self) -> torch.Tensor:
        """Position that the next token gets, int64 `[B]`."""
        return self._next

    # Between forwards

    def reserve(self) -> None:
        """Count one more slot as used in every layer: a forward comes.

        Raises:
            ValueError: If a layer is full.
        """
        for number, layer in enumerate(self.layers):
            if layer.length == layer.capacity:
                raise ValueError(f"capacity: the {layer.capacity} slots of layer {number} are full")
            layer.length += 1

    def settle(self) -> None:
        """Nothing to do: empty slots are at the left end."""

    def keep(self, layer: int, indices: torch.Tensor) -> None:
        """Keep only the given rows of a layer.

        Args:
            layer: Which layer.
            indices: Slots int64 `[B, H, K]` in their new order, -1 for none; those move to the left end.
        """
        self.layers[layer].keep(indices)

    def evict(self, layer: int, batch: torch.Tensor, indices: torch.Tensor) -> None:
        """Keep only the slots `[R, H, K]` of a layer in some rows `[R]` of the batch."""
        self.layers[layer].evict(batch, indices)

    def retire(self, rows: torch.Tensor) -> None:
        """These rows of the batch have ended: their slots are empty from now on."""
        self._alive[rows] = 0
        self._noted[rows] = -1
        for layer in self.layers:
            layer.vacate(rows)

    # Around each forward

    @property
    def incoming(self) -> Incoming:
        """The token of the running forward."""
        return Incoming(self._next[:, None], padded=False)

    def begin(
        self, batch: int, new: int, mask: torch.Tensor | None, positions: torch.Tensor | None, device: torch.device
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """A forward of one token for each row begins; see `HookedCache`. Its mask and position ids are not used."""
        if new != 1 or batch != len(self._next):
            raise ValueError(f"a static memory of {len(self._next)} rows takes one token for each of them at a time")
        # Four dimensions keep the model from making a mask; every layer gets its own.
        return self._any, self._next[:, None]

    def mask(self, layer: int, attention: str, dtype: torch.dtype) -> torch.Tensor | None:
        """Mask of one layer in the running forward."""
        visible = self.layers[layer].visible(self._next, self._windows[layer])
        return form(visible, attention, self._groups, dtype)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write keys and values `[B, H, 1, D]` of the running forward; returns the buffers `[B, H, C, D]`."""
        return self.layers[layer_idx].update(key_states, value_states, positions=self._noted)

    def end(self) -> None:
        """The forward has ended."""
        self._next.add_(self._alive)
        self._noted.add_(self._alive)
        for layer in self.layers:
            layer.advance()


def check_storage(memory: KVMemory) -> None:
    """Refuse a memory that cannot become static.

    Raises:
        UserError: If it stores its rows in codes.
    """
    if memory.codec.storage != "full":
        raise UserError(
            f"storage: static decoding writes rows as the model makes them, and this memory stores "
            f"{memory.codec.storage}: use a full one, or decode without static shapes"
        )
