"""Compression chunk by chunk: what inference runs. Equal to the parallel forward over the same tokens.

    memory = CompressedMemory(compressor)
    memory.keep(prompt)                 # stays as it is
    memory.compress(chunk)              # becomes n rows of keys and values for each layer and head
    memory.compress(chunk)
    memory.generate(query, 50)

Shapes: B batch, T tokens, n slots, H KV heads, N slots of the KV memory.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from transformers import PreTrainedModel

from kvc.cache.accounting import storage_bytes
from kvc.cache.memory import KVMemory
from kvc.core.attention import kernel_of
from kvc.core.backbone import decoder
from kvc.core.masks import Kind, Layout, is_merged
from kvc.errors import UserError
from kvc.methods.ccm.gate import GATE
from kvc.methods.ccm.parallel import Compressor
from kvc.methods.ccm.positions import advance, position_ids

RECURRENT: tuple[Kind, ...] = ("concat_recur", "merge_recur")
"""Kinds whose chunks see what was remembered before."""
KINDS: tuple[Kind, ...] = ("concat", "merge", *RECURRENT)


class CompressedMemory:
    """The memory of a batch of contexts, which may differ in length and in number of chunks.

    Gradients pass through it, unless the caller forbids them.

    Args:
        compressor: Model, memory tokens and kind.

    Attributes:
        memory: Keys, values and positions of what is remembered.
        steps: Chunks compressed so far, int64 `[B]`; empty before the first call.
        peak: Most rows that a layer ever held, memory, chunk and memory tokens, int64 `[B]`.

    Raises:
        UserError: If the kind cannot compress chunk by chunk, or the attention kernel does not suit it.
    """

    def __init__(self, compressor: Compressor) -> None:
        if compressor.kind not in KINDS:
            raise UserError(f"kind: '{compressor.kind}' cannot compress chunk by chunk, only {', '.join(KINDS)} can")
        attention = kernel_of(str(compressor.model.config._attn_implementation))
        if attention not in ("sdpa", "eager"):
            raise UserError(
                f"attn_implementation: {attention} is for the parallel form, chunks are read with sdpa or eager: "
                "call model.set_attn_implementation('sdpa') first"
            )
        self.compressor = compressor
        self.memory = KVMemory(compressor.model)
        self.steps = torch.zeros(1, dtype=torch.int64, device=compressor.model.device)
        self.peak = self.steps
        self._prefix: KVMemory | None = None

    def keep(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> None:
        """Read tokens that stay in the memory as they are: an attention sink, a prompt.

        Args:
            input_ids: Ordinary tokens `[B, T]`.
            attention_mask: `[B, T]`, 0 for padding; None for no padding.

        Raises:
            ValueError: If a chunk was compressed before.
        """
        if int(self.steps.max()):
            raise ValueError("tokens to keep come before the first chunk that is compressed")
        self._run(self.memory, input_ids, self._layout(input_ids, attention_mask))

    def compress(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> None:
        """Read a chunk, and remember one run of memory tokens instead of it.

        Args:
            input_ids: Ordinary tokens `[B, T]`; B may be anything if the memory has one row.
            attention_mask: `[B, T]`, 0 for padding; None for no padding. A row without any token stays as it is.
        """
        kind, tokens, batch = self.compressor.kind, self.compressor.tokens, len(input_ids)
        length = self._layout(input_ids, attention_mask).valid.sum(-1)
        active = length > 0
        if not bool(active.any()):
            return
        start = self._start(batch)
        if self.memory.layers[0].is_initialized and len(self.memory.next_position) < batch:
            self.memory.batch_repeat_interleave(batch)
        if kind not in RECURRENT and self._prefix is None:
            self._prefix = self.memory.fork()

        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        mask = torch.cat([mask, active.to(mask)[:, None].expand(-1, tokens.slots)], dim=1)
        input_ids = torch.cat([input_ids, tokens.run(batch)], dim=1)
        layout = self._layout(input_ids, mask)
        added = active * tokens.slots
        if kind in RECURRENT:
            self._run(self.memory, input_ids, layout)
            held, between = _rows(self.memory) - length - added, length
        else:
            assert self._prefix is not None
            alone = self._prefix.fork()
            self._run(alone, input_ids, layout)
            select(alone, torch.zeros_like(added), torch.zeros_like(added), added)
            self.memory.extend(alone)
            held, between = _rows(self.memory) - added, torch.zeros_like(length)
        self.peak = torch.maximum(self.peak, held + length + added)
        self.steps = self.steps + active
        if is_merged(kind):
            merged = active & (self.steps > 1)
            self._merge(merged, between)
            held, between = held - merged * tokens.slots, between + merged * tokens.slots
        select(self.memory, held, between, added)
        self.memory.next_position = start + advance(length, tokens.slots, self.compressor.positions)

    def logits(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Logits `[B, T, V]` of tokens that follow the memory, which stays as it is.

        Args:
            input_ids: Ordinary tokens `[B, T]`; B may be anything if the memory has one row.
            attention_mask: `[B, T]`, 0 for padding; None for no padding.
        """
        output = self._run(self.memory.fork(), input_ids, self._layout(input_ids, attention_mask))
        return self.compressor.logits(output.last_hidden_state)

    @torch.no_grad()
    def generate(
        self, input_ids: torch.Tensor, max_new_tokens: int, attention_mask: torch.Tensor | None = None, **kwargs: Any
    ) -> Any:
        """What follows a query, by the `generate` of transformers; the memory stays as it is.

        Args:
            input_ids: The query `[B, T]`, left-padded; B may be anything if the memory has one row.
            max_new_tokens: Most tokens to make.
            attention_mask: `[B, T]`, 0 for padding; None for no padding.
            **kwargs: Further settings of `generate`.

        Returns:
            Query and new tokens, `[B, T + new]`, or what `kwargs` ask for.
        """
        continued = self.memory.fork().generate_kwargs(input_ids, attention_mask)
        with reader(self.compressor) as model:
            return model.generate(input_ids, **continued, max_new_tokens=max_new_tokens, **kwargs)

    @property
    def bytes(self) -> int:
        """Bytes of everything held: the memory, and for `concat` and `merge` the kept tokens that each chunk sees."""
        held = [self.memory] if self._prefix is None else [self.memory, self._prefix]
        return storage_bytes(tensor for memory in held for layer in memory.layers for tensor in layer.tensors())

    def restore(self, memory: KVMemory, steps: torch.Tensor, peak: torch.Tensor) -> None:
        """Go on from a memory that another one of the same kind and number of memory tokens left.

        Args:
            memory: Its `memory`.
            steps: Its `steps`, int64 `[B]`.
            peak: Its `peak`, int64 `[B]`.
        """
        self.memory, self.steps, self.peak, self._prefix = memory, steps, peak, None
        if self.compressor.kind in RECURRENT or not int(steps.max()):
            return
        runs = steps.clamp(max=1) if is_merged(self.compressor.kind) else steps
        dropped = runs * self.compressor.tokens.slots
        kept = _rows(memory) - dropped
        self._prefix = KVMemory(self.compressor.model)
        if int(kept.max()):
            self._prefix = memory.fork()
            select(self._prefix, kept, dropped, torch.zeros_like(kept))
            self._prefix.next_position = kept

    def _layout(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> Layout:
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        return self.compressor.layout(input_ids, mask)

    def _start(self, batch: int) -> torch.Tensor:
        """Next position, int64 `[B]`."""
        if not self.memory.layers[0].is_initialized:
            return self.steps.new_zeros(batch)
        return self.memory.next_position.expand(batch)

    def _run(self, memory: KVMemory, input_ids: torch.Tensor, layout: Layout) -> Any:
        """Read tokens into a memory, from the next position of the own one on."""
        start = self._start(len(input_ids))
        arguments: dict[str, Any] = {
            "inputs_embeds": self.compressor.embed(input_ids),
            "attention_mask": layout.valid.long(),
            "position_ids": position_ids(layout, self.compressor.positions) + start[:, None],
            "past_key_values": memory,
            "use_cache": True,
        }
        if self.compressor.conditional:
            arguments[GATE] = layout.memory.flatten().nonzero().flatten()
        return decoder(self.compressor.model)(**arguments)

    def _merge(self, merged: torch.Tensor, between: torch.Tensor) -> None:
        """Merge the run before the last `between` slots into the last run, in the rows `merged` `[B]`."""
        slots = self.compressor.tokens.slots
        share = self.compressor.merge.share(self.steps.clamp(min=1)).float().where(merged, 1.0)[:, None, None, None]
        for index, layer in enumerate(self.memory.layers):
            end = layer.length - slots
            old = end - slots - between[:, None] + torch.arange(slots, device=between.device)
            old = old.clamp(min=0)[:, None, :, None]

            def mix(rows: torch.Tensor, old: torch.Tensor = old, end: int = end) -> torch.Tensor:
                new = rows[:, :, end:].float()
                before = rows.gather(2, old.expand(-1, rows.shape[1], -1, rows.shape[-1])).float()
                return torch.where(merged[:, None, None, None], before + share * (new - before), new).to(rows.dtype)

            keys, values, positions = mix(layer.keys), mix(layer.values), layer.seen[..., end:]
            self.memory.replace(index, (-slots, None), keys, values, positions)


@contextmanager
def reader(compressor: Compressor) -> Iterator[PreTrainedModel]:
    """The model below its PEFT wrapper, as it reads ordinary tokens: conditional adapters do nothing, and are off."""
    model: Any = compressor.model
    off = compressor.conditional and hasattr(model, "disable_adapter")
    with model.disable_adapter() if off else nullcontext():
        yield model.get_base_model() if hasattr(model, "get_base_model") else model


def select(memory: KVMemory, first: torch.Tensor, dropped: torch.Tensor, last: torch.Tensor) -> None:
    """Drop the rows between the first and the last ones of each row of the batch.

    Args:
        memory: Where every layer and head holds the same tokens.
        first: Rows to keep before the dropped ones, int64 `[B]`.
        dropped: Rows to drop.
        last: Rows to keep after them, up to the end.
    """
    most = int((first + last).max())
    back = torch.arange(most - 1, -1, -1, device=first.device)[None]
    gap = torch.where(back < last[:, None], 0, dropped[:, None])
    empty = back >= (first + last)[:, None]
    for index, layer in enumerate(memory.layers):
        slots = (layer.length - 1 - back - gap).masked_fill(empty, -1)
        memory.keep(index, slots[:, None])


def _rows(memory: KVMemory) -> torch.Tensor:
    """Rows in each layer and head, int64 `[B]`."""
    memory.settle()
    return memory.layers[0].counts[:, 0]
