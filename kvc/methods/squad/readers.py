"""The ways of reading a context: as it is, as slots, as anchors.

Shapes: B batch, S context tokens, C pieces of a context, M slots, D width.
"""

from typing import Protocol

import torch
from transformers import PreTrainedModel

from kvc.core.attention import check_standard
from kvc.errors import UserError
from kvc.methods.squad.anchor import Anchors
from kvc.methods.squad.assembly import Positions
from kvc.methods.squad.budget import Budget
from kvc.methods.squad.chunks import join, split
from kvc.methods.squad.interface import SlotCompressor, Slots
from kvc.methods.squad.reading import MemoryReading, Reading, SlotReading, Tokens
from kvc.methods.squad.source import Source


class Reader(Protocol):
    """Reads the contexts of a batch under a budget."""

    def read(self, model: PreTrainedModel, head: Tokens, context: Tokens, budget: Budget) -> Reading:
        """What stands for head and context from now on."""
        ...


class TextReader:
    """Nothing is compressed: the budget has no effect."""

    def read(self, model: PreTrainedModel, head: Tokens, context: Tokens, budget: Budget | None = None) -> Reading:
        """See `Reader`."""
        embeds = model.get_input_embeddings()(context.ids)
        return SlotReading(head, Slots(embeds, context.mask, {}), context.lengths)


class SlotReader:
    """A compressor makes slots of source states.

    Args:
        source: Which states.
        compressor: Of which width the model is.
        max_length: A longer context is compressed in consecutive pieces of so many tokens, each under the same budget.
        positions: Where the slots stand.
        bos: Token that stands before each piece while its states are made; None for nothing.
    """

    def __init__(
        self,
        source: Source,
        compressor: SlotCompressor,
        max_length: int,
        positions: Positions = "compact",
        bos: int | None = None,
    ) -> None:
        self.source, self.compressor, self.max_length = source, compressor, max_length
        self.positions, self.bos = positions, bos

    def read(self, model: PreTrainedModel, head: Tokens, context: Tokens, budget: Budget) -> Reading:
        """See `Reader`."""
        batch = len(context.ids)
        # Positions count from the left, so the text must begin there.
        ids, mask = split(*context.right(), self.max_length)
        states = self.source.encode(model, ids, mask, self.bos)
        slots = join(self.compressor(states, mask, budget), batch)
        with torch.no_grad():
            valid = states.detach().float().masked_fill(~mask[..., None], 0.0).sum(1).view(batch, -1, states.shape[-1])
            reference = valid.sum(1) / context.lengths.clamp(min=1)[:, None]
        return SlotReading(head, slots, context.lengths, self.positions, reference)


class AnchorReader:
    """The keys and values of some of the context's own tokens.

    Args:
        anchors: The marks.
    """

    def __init__(self, anchors: Anchors) -> None:
        self.anchors = anchors

    def read(self, model: PreTrainedModel, head: Tokens, context: Tokens, budget: Budget) -> Reading:
        """See `Reader`."""
        memory = self.anchors(model, *head, *context, budget)
        # Not asked of the budget again, which may be drawn anew.
        return MemoryReading(memory, head.lengths, memory.tokens.round().long() - head.lengths)


def check_anchors(model: PreTrainedModel, positions: Positions, checkpointing: bool, lora: bool) -> None:
    """Refuse settings under which anchors would learn nothing or something else.

    Raises:
        UserError: If so.
    """
    check_standard(model, "a memory of anchors")
    if positions == "spread":
        raise UserError("model.positions: has no effect with anchors, which stay at their own positions")
    if checkpointing:
        # transformers drops the cache of a layer that is computed again, without an error.
        raise UserError("model.backbone.gradient_checkpointing: anchors are keys and values, which it would drop")
    if not lora:
        raise UserError("model.backbone.lora: anchors need a LoRA that reads the text, give at least its rank")
