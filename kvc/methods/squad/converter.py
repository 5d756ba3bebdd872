"""Slots of one model in the input space of another.

Shapes: B batch, S context tokens, M slots, A width of the model that compresses, D width of the one that reads.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import nn
from transformers import PreTrainedModel

from kvc.methods.squad.budget import Budget
from kvc.methods.squad.interface import Slots
from kvc.methods.squad.readers import Reader
from kvc.methods.squad.reading import Reading, SlotReading, Tokens


class Converter(nn.Module):
    """Norm, linear layer, GELU, linear layer, and a norm as large as the embeddings of the model that reads.

    Parameters: A + (A H + H) + (H D + D) + D.

    Args:
        width: A.
        target: D.
        rms: Root mean square of the output at the start, that of the embeddings of the reading model.
        hidden: H, D if None.
    """

    def __init__(self, width: int, target: int, rms: float, hidden: int | None = None) -> None:
        super().__init__()
        hidden = hidden or target
        self.norm_in = nn.RMSNorm(width)
        self.widen, self.narrow = nn.Linear(width, hidden), nn.Linear(hidden, target)
        self.norm_out = nn.RMSNorm(target)
        nn.init.constant_(self.norm_out.weight, rms)

    def forward(self, slots: torch.Tensor) -> torch.Tensor:
        """Slots `[B, M, D]` of slots `[B, M, A]`."""
        inner = nn.functional.gelu(self.widen(self.norm_in(slots.to(self.widen.weight.dtype))))
        return self.norm_out(self.narrow(inner))


class Translation:
    """The same texts in the tokens of another model.

    Args:
        ours: Tokenizer of the tokens that come.
        theirs: Tokenizer of those that go.
    """

    def __init__(self, ours: Any, theirs: Any) -> None:
        self.ours, self.theirs = ours, theirs
        self.same = ours.backend_tokenizer.to_str() == theirs.backend_tokenizer.to_str()

    def __call__(self, tokens: Tokens) -> Tokens:
        """Tokens of the other model, padded on the right; the same ones if both models cut texts alike."""
        if self.same:
            return tokens
        texts = [
            self.ours.decode(ids[mask], clean_up_tokenization_spaces=False)
            for ids, mask in zip(tokens.ids, tokens.mask)
        ]
        return self._padded([self.theirs(text, add_special_tokens=False)["input_ids"] for text in texts], tokens)

    def _padded(self, rows: Sequence[list[int]], like: Tokens) -> Tokens:
        size = max(1, *map(len, rows))
        ids = torch.tensor([row + [0] * (size - len(row)) for row in rows], device=like.ids.device)
        lengths = torch.tensor([len(row) for row in rows], device=ids.device)
        return Tokens(ids, torch.arange(size, device=ids.device) < lengths[:, None])


class Compressing(Protocol):
    """A trained compressor with its model."""

    backbone: PreTrainedModel
    reader: Reader

    def to(self, device: torch.device) -> Any:
        """Move both."""
        ...


class ConvertedReader:
    """Reads a context with another model's compressor, and converts its slots.

    Args:
        foreign: The trained compressor, frozen and in eval mode. It is no part of the method that owns this reader: no
            checkpoint holds it.
        translation: Into its tokens.
        converter: Of its slots.
    """

    def __init__(self, foreign: Compressing, translation: Translation, converter: Converter) -> None:
        self.foreign, self.translation, self.converter = foreign, translation, converter

    def read(self, model: PreTrainedModel, head: Tokens, context: Tokens, budget: Budget) -> Reading:
        """See `Reader`; the head stays with the model that reads."""
        foreign = self.foreign
        with torch.no_grad():
            foreign.to(context.ids.device)
            made = foreign.reader.read(foreign.backbone, head, self.translation(context), budget).slots
        assert made is not None, "a reader without slots cannot be converted"
        slots = self.converter(made.slots).masked_fill(~made.mask[..., None], 0.0)
        return SlotReading(head, Slots(slots, made.mask, {}), context.lengths)
