"""Running a stock model on rows that know their positions: what happens in each forward, and its arguments.

Shapes: B batch, H KV heads, N slots, T new tokens.
"""

from typing import Any

import torch

from kvc.cache.hooked import HookedCache
from kvc.cache.layer import MemoryLayer
from kvc.cache.masks import Incoming, filled, form, layer_mask, same_slots


class PositionedCache(HookedCache):
    """A cache whose slots are not positions, and that grows with every token.

    Args:
        layers: One for each layer of the model.
        windows: Positions that a token of each layer looks back; None for all.
        groups: Query heads per KV head.
    """

    layers: list[MemoryLayer]

    def __init__(self, layers: list[MemoryLayer], windows: list[int | None], groups: int) -> None:
        super().__init__(layers, windows, groups)
        self._next: torch.Tensor | None = None
        self._incoming: Incoming | None = None
        self._alike: bool | None = None
        self._spread = False

    @property
    def incoming(self) -> Incoming:
        """The tokens of the running forward."""
        assert self._incoming is not None, "no forward is running"
        return self._incoming

    @property
    def next_position(self) -> torch.Tensor:
        """Position that the next token gets, int64 `[B]`; may be set, to a number or `[B]`.

        Raises:
            ValueError: If the memory is empty, or what it is set to has another batch.
        """
        if self._next is None:
            raise ValueError("an empty memory has no batch, so it has no next position")
        return self._next

    @next_position.setter
    def next_position(self, value: int | torch.Tensor) -> None:
        batch = len(self.next_position)
        value = torch.as_tensor(value, dtype=torch.int64, device=self.next_position.device)
        if value.dim() > 1 or (value.dim() == 1 and value.shape[0] != batch):
            raise ValueError(f"next_position: shape {[*value.shape]} does not fit a batch of {batch}")
        # Of its own, with a stride: files are hashed byte by byte.
        self._next = value.expand(batch).clone(memory_format=torch.contiguous_format)
        self._spread = True

    def adopt(self, next_position: torch.Tensor) -> None:
        """Take the layers as they were filled from outside.

        Args:
            next_position: `[B]`.
        """
        self._next = next_position.long()
        self._changed()

    # Arguments of a forward

    def forward_kwargs(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> dict[str, Any]:
        """Arguments of `model(input_ids, ...)` that go on from here.

        Args:
            input_ids: New tokens `[B, T]`; B may be anything if the memory has one row.
            attention_mask: `[B, T]`, 0 for padding; None for no padding.

        Returns:
            `past_key_values`, `attention_mask` `[B, N + T]` and `position_ids` `[B, T]`.

        Raises:
            ValueError: If batch or mask do not fit.
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if attention_mask.shape != input_ids.shape:
            shapes = f"{[*attention_mask.shape]} is not the input's, {[*input_ids.shape]}"
            raise ValueError(f"attention_mask: its shape {shapes}; the memory itself knows about what came before")
        batch = len(input_ids)
        self.settle()
        held = attention_mask[:, :0]
        if self._next is not None:
            if batch != len(self._next) and len(self._next) != 1:
                raise ValueError(f"input_ids: a batch of {batch} does not fit a memory of {len(self._next)} rows")
            held = filled(self.layers[0]).any(1).to(attention_mask).expand(batch, -1)
        mask = torch.cat([held, attention_mask], dim=1)
        return {"past_key_values": self, "attention_mask": mask, "position_ids": self._following(attention_mask)}

    def generate_kwargs(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> dict[str, Any]:
        """Arguments of `model.generate(input_ids, ...)` that go on from here.

        The memory grows in place, and with `num_return_sequences` it becomes one of that many rows: generate from a
        fork to keep this one as it is.

        Args:
            input_ids: New tokens `[B, T]` only, left-padded; B may be anything if the memory has one row.
            attention_mask: `[B, T]`, 0 for padding; None for no padding.

        Returns:
            `past_key_values`, and `attention_mask` and `position_ids`, both `[B, N + T]`: generate cuts off the
            columns of what it takes to be in the cache.

        Raises:
            ValueError: If batch or mask do not fit.
        """
        kwargs = self.forward_kwargs(input_ids, attention_mask)
        positions = kwargs["position_ids"]
        held = positions.new_zeros(len(positions), kwargs["attention_mask"].shape[1] - positions.shape[1])
        return {**kwargs, "position_ids": torch.cat([held, positions], dim=1)}

    def _following(self, valid: torch.Tensor) -> torch.Tensor:
        """Positions `[B, T]` of the next tokens; left padding gets that of the first."""
        steps = (valid.long().cumsum(-1) - 1).clamp(min=0)
        return steps if self._next is None else steps + self._next[:, None]

    # Around each forward

    def begin(
        self, batch: int, new: int, mask: torch.Tensor | None, positions: torch.Tensor | None, device: torch.device
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """A forward begins.

        Args:
            batch: Rows of its input; a multiple of those held repeats each of them.
            new: Tokens of its input, padding included.
            mask: Its mask. Of a 2-D one only the last `new` columns count (0 is padding): the memory knows which of
                its slots are filled. Any other is taken as it is.
            positions: Its position ids, of which the last `new` columns count; None takes the next ones.
            device: Of its input.

        Returns:
            Mask and position ids `[B, T]` to run it with.

        Raises:
            ValueError: If the batch does not fit.
        """
        self.settle()
        if self._next is not None and batch != len(self._next):
            if batch % len(self._next):
                raise ValueError(f"a forward of {batch} rows does not fit a memory of {len(self._next)}")
            self.batch_repeat_interleave(batch // len(self._next))
        flat = mask is None or (isinstance(mask, torch.Tensor) and mask.dim() == 2)
        valid = mask[:, -new:].bool() if mask is not None and flat else None
        if valid is not None and bool(valid.all()):
            valid = None
        if positions is None and valid is None and new == 1 and self._next is not None:
            positions = self._next[:, None]
        elif positions is None:
            positions = self._following(torch.ones(batch, new, device=device) if valid is None else valid)
        positions = positions[..., -new:].expand(batch, -1)
        noted = positions if valid is None else positions.masked_fill(~valid, -1)
        self._incoming = Incoming(noted, valid is not None)
        self.layered = flat and self._needs_layers(new)
        if not flat:
            return mask, positions
        first = self.layers[0]
        if valid is None and not first.padded:
            return None, positions
        held = filled(first)[:, 0] if first.is_initialized else noted[:, :0] >= 0
        return torch.cat([held, noted >= 0], dim=1).long(), positions

    def _needs_layers(self, new: int) -> bool:
        """Whether one mask, made from slots, does not do for all layers and heads."""
        if self._alike is None:
            self._alike = same_slots(self.layers)
        # Few rows may reach far back where others between them are gone.
        windows = any(
            w is not None and (self._spread or layer.length + new > w) for layer, w in zip(self.layers, self._windows)
        )
        return windows or not self._alike

    def _changed(self) -> None:
        """Rows came, went or moved without a forward: slots no longer tell where the rows of layers and heads are."""
        self._alike, self._spread = None, True

    def mask(self, layer: int, attention: str, dtype: torch.dtype) -> torch.Tensor | None:
        """Mask of one layer in the running forward.

        Args:
            layer: Which layer.
            attention: Name of the attention kernel.
            dtype: Of the hidden states.

        Returns:
            In the form that the kernel takes; None for all visible.
        """
        assert self._incoming is not None
        visible = layer_mask(self.layers[layer], self._incoming, self._windows[layer])
        return form(visible, attention, self._groups, dtype)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append keys and values `[B, H, T, D]` of the running forward; returns all `[B, H, N + T, D]`.

        Raises:
            ValueError: If no forward is running on the memory's own model.
        """
        new = self._incoming
        if new is None or new.positions.shape[1] != key_states.shape[2]:
            raise ValueError("a memory is used with the model it was made for: KVMemory(model)")
        return self.layers[layer_idx].update(key_states, value_states, positions=new.positions, padded=new.padded)

    def end(self) -> None:
        """The forward has ended: the next token follows the last one, in each row."""
        assert self._incoming is not None
        new, self._incoming = self._incoming, None
        if new.padded:
            self._advance(new.positions)
        else:
            self._next = new.positions.amax(1).long() + 1 if new.positions.shape[1] > 1 else new.positions[:, 0] + 1

    def _advance(self, positions: torch.Tensor) -> None:
        """Go on behind `positions` `[B, ...]`; rows that have none stay."""
        last = positions.flatten(1).amax(1).long()
        before = torch.zeros_like(last) if self._next is None else self._next
        self._next = torch.where(last < 0, before, last + 1)

    def settle(self) -> None:
        """Move empty slots to the left end, in every layer."""
        for layer in self.layers:
            layer.settle()

    # Rows of the batch

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row of the batch several times, side by side."""
        super().batch_repeat_interleave(repeats)
        self._next = None if self._next is None else self._next.repeat_interleave(repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Only the given rows of the batch, in their order."""
        super().batch_select_indices(indices)
        self._next = None if self._next is None else self._next[indices.to(self._next.device)]

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Rows in the order of the beams."""
        self.batch_select_indices(beam_idx)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens, as many as the negative number says."""
        super().crop(tokens_to_remove)
        if tokens_to_remove and self._next is not None:
            self.settle()
            self._next = (self._next + tokens_to_remove).clamp(min=0)
            self._alike = None

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self._next, self._incoming, self._alike, self._spread = None, None, None, False
