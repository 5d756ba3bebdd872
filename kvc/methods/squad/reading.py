"""A context that was read, and how a language model goes on from it: to predict an answer, or to generate one.

Shapes: B batch, P tokens of a part, S context tokens, M slots, T places of the whole, N predicted tokens, D width.
"""

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from kvc.cache.memory import KVMemory
from kvc.core.backbone import decoder, head_logits
from kvc.errors import UserError
from kvc.methods.squad.assembly import IGNORED, Positions, assemble, tokens
from kvc.methods.squad.interface import Slots
from kvc.methods.squad.losses.evidence import Predicted


class Tokens(NamedTuple):
    """One part of every row: ids `[B, P]` and their mask, bool `[B, P]`; padding may be anywhere."""

    ids: torch.Tensor
    mask: torch.Tensor

    @classmethod
    def of(cls, batch: dict[str, Any], part: str) -> "Tokens":
        """The part `head`, `context`, `tail` or `answer` of a batch."""
        return cls(batch[f"{part}_ids"], batch[f"{part}_mask"].bool())

    @classmethod
    def labelled(cls, ids: torch.Tensor) -> "Tokens":
        """Tokens `[B, P]` with -100 for padding."""
        return cls(ids.clamp(min=0), ids != IGNORED)

    @property
    def labels(self) -> torch.Tensor:
        """Ids with -100 for padding."""
        return self.ids.masked_fill(~self.mask, IGNORED)

    @property
    def lengths(self) -> torch.Tensor:
        """Tokens of each row, int64 `[B]`."""
        return self.mask.sum(1)

    def right(self) -> "Tokens":
        """The same, padded on the right."""
        order = (~self.mask).long().argsort(dim=1, stable=True)
        return Tokens(self.ids.gather(1, order), self.mask.gather(1, order))

    def left(self) -> "Tokens":
        """The same, padded on the left and no wider than the longest row, but at least one."""
        order = self.mask.long().argsort(dim=1, stable=True)
        order = order[:, order.shape[1] - max(1, int(self.lengths.max())) :]
        return Tokens(self.ids.gather(1, order), self.mask.gather(1, order))


class Reading(ABC):
    """What stands for head and context of a batch.

    Attributes:
        head: Tokens of each head, int64 `[B]`.
        counts: Rows of the KV cache that stand for each context, int64 `[B]`.
        slots: The slots, of a compressor that makes some.
        reference: Mean of the source states of each context, `[B, D]`, without gradient; where there are slots.
    """

    head: torch.Tensor
    counts: torch.Tensor
    slots: Slots | None = None
    reference: torch.Tensor | None = None

    @abstractmethod
    def predict(self, model: PreTrainedModel, tail: Tokens, answer: Tokens) -> Predicted:
        """Predict each token of an answer that follows the tail; logits are made for these tokens only."""

    @abstractmethod
    def prompt(self, model: PreTrainedModel, tail: Tokens) -> tuple[dict[str, Any], int]:
        """Arguments of `model.generate`, and how many of the columns that it returns are not new."""


class SlotReading(Reading):
    """Vectors in the place of the context: slots, or the embeddings of the text itself.

    Args:
        head: What stands before the context.
        slots: The vectors.
        lengths: Tokens of each context, int64 `[B]`.
        positions: Where the slots stand.
        reference: See `Reading`.
    """

    def __init__(
        self,
        head: Tokens,
        slots: Slots,
        lengths: torch.Tensor,
        positions: Positions = "compact",
        reference: torch.Tensor | None = None,
    ) -> None:
        self.head, self.counts = head.lengths, slots.mask.sum(1)
        self.slots, self.reference = slots, reference
        self._head, self._slots, self._lengths, self._positions = head, slots, lengths, positions

    def predict(self, model: PreTrainedModel, tail: Tokens, answer: Tokens) -> Predicted:
        """See `Reading`."""
        table = model.get_input_embeddings()
        whole = self._whole(model, tail, tokens(table, *answer, predicted=True))
        hidden = decoder(model)(**whole.arguments(), use_cache=False).last_hidden_state
        return _predicted(model, hidden, whole.labels)

    def prompt(self, model: PreTrainedModel, tail: Tokens) -> tuple[dict[str, Any], int]:
        """See `Reading`."""
        return dict(self._whole(model, tail).arguments()), 0

    def _whole(self, model: PreTrainedModel, tail: Tokens, answer: Any = None) -> Any:
        table = model.get_input_embeddings()
        head, after = tokens(table, *self._head), tokens(table, *tail)
        return assemble(head, self._slots, after, answer, self._lengths, self._positions)


class MemoryReading(Reading):
    """Keys and values of head and context.

    Args:
        memory: They, at their positions.
        head: Tokens of each head, int64 `[B]`.
        counts: Rows that stand for each context, int64 `[B]`.
    """

    def __init__(self, memory: KVMemory, head: torch.Tensor, counts: torch.Tensor) -> None:
        self.memory, self.head, self.counts = memory, head, counts

    def predict(self, model: PreTrainedModel, tail: Tokens, answer: Tokens) -> Predicted:
        """See `Reading`."""
        _check_tail(tail)
        mask = torch.cat([tail.mask, answer.mask], dim=1)
        labels = torch.cat([torch.full_like(tail.ids, IGNORED), answer.labels], dim=1)
        ids = Tokens(torch.cat([tail.ids, answer.ids], dim=1), mask).left()
        given = self.memory.fork().forward_kwargs(ids.ids, ids.mask.long())
        hidden = decoder(model)(input_ids=ids.ids, **given, use_cache=True).last_hidden_state
        placed = Tokens(labels, mask).left()
        return _predicted(model, hidden, placed.labels)

    def prompt(self, model: PreTrainedModel, tail: Tokens) -> tuple[dict[str, Any], int]:
        """See `Reading`."""
        _check_tail(tail)
        ids = tail.left()
        return {"inputs": ids.ids, **self.memory.fork().generate_kwargs(ids.ids, ids.mask.long())}, ids.ids.shape[1]


def _check_tail(tail: Tokens) -> None:
    if not bool(tail.mask.any(1).all()):
        raise UserError(
            "data.scope: anchors cannot hold a whole prompt, since nothing is left to go on from; use context"
        )


def _predicted(model: PreTrainedModel, hidden: torch.Tensor, labels: torch.Tensor) -> Predicted:
    """Predictions of labelled tokens from hidden states `[B, T, D]`: those at i - 1 predict token i."""
    chosen = labels[:, 1:] != IGNORED
    logits = head_logits(model, hidden[:, :-1][chosen])
    return Predicted(logits, labels[:, 1:][chosen], chosen.nonzero()[:, 0], len(labels))
