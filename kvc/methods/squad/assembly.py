"""The language model's input: head, slots, tail and answer of each row, one after the other.

Shapes: B batch, T places of the whole, D width.
"""

from typing import Literal, NamedTuple

import torch

from kvc.methods.squad.interface import Slots

Positions = Literal["compact", "spread"]
IGNORED = -100


class Part(NamedTuple):
    """One stretch of every row.

    Attributes:
        embeds: `[B, P, D]`.
        mask: bool `[B, P]`; padding may be anywhere.
        labels: int64 `[B, P]`, what is to be predicted; None for a part that is only read.
    """

    embeds: torch.Tensor
    mask: torch.Tensor
    labels: torch.Tensor | None = None


class LmInput(NamedTuple):
    """What a causal LM takes, padded on the left.

    Attributes:
        inputs_embeds: `[B, T, D]`, 0 on padding.
        attention_mask: int64 `[B, T]`.
        position_ids: int64 `[B, T]`, 0 on padding.
        labels: int64 `[B, T]`, -100 where nothing is predicted.
    """

    inputs_embeds: torch.Tensor
    attention_mask: torch.Tensor
    position_ids: torch.Tensor
    labels: torch.Tensor

    def arguments(self) -> dict[str, torch.Tensor]:
        """Keyword arguments of `model(...)` and of `model.generate(...)`, which then returns new tokens only."""
        return {
            "inputs_embeds": self.inputs_embeds,
            "attention_mask": self.attention_mask,
            "position_ids": self.position_ids,
        }


def tokens(embeddings: torch.nn.Module, ids: torch.Tensor, mask: torch.Tensor, predicted: bool = False) -> Part:
    """A part of ordinary tokens.

    Args:
        embeddings: Of the model that reads.
        ids: `[B, P]`.
        mask: `[B, P]`, 0 for padding.
        predicted: The tokens are the answer, that is labels, too.
    """
    mask = mask.bool()
    return Part(embeddings(ids), mask, ids.masked_fill(~mask, IGNORED) if predicted else None)


def assemble(
    head: Part,
    slots: Slots,
    tail: Part,
    answer: Part | None = None,
    lengths: torch.Tensor | None = None,
    positions: Positions = "compact",
) -> LmInput:
    """Put the parts together.

    With `compact` positions a row is a short text: 0, 1, 2 ... With `spread` the slots stand where their share of the
    text stood, evenly over its n places, and the tail goes on after them (Zhao et al. 2024, EPL).

    Args:
        head: What stands before the text, with BOS: it stays as it is, since attention needs a first token to rest on.
        slots: The compressed text.
        tail: Question and cue.
        answer: The answer with its end token, in training; None to generate it.
        lengths: Tokens of the text, n, int64 `[B]`; only `spread` needs them.
        positions: Rule of positions.
    """
    compressed = Part(slots.slots.to(head.embeds.dtype), slots.mask)
    parts = [head, compressed, tail, *([] if answer is None else [answer])]
    mask = torch.cat([part.mask for part in parts], dim=1)
    places = mask.long().cumsum(1) - 1
    if positions == "spread":
        if lengths is None:
            raise ValueError("spread positions need the lengths of the texts")
        places = _spread(places, head.mask, slots.mask, lengths)
    order = mask.long().argsort(dim=1, stable=True)[:, mask.shape[1] - int(mask.sum(1).max()) :]
    mask = mask.gather(1, order)
    embeds = torch.cat([part.embeds for part in parts], dim=1)
    embeds = embeds.gather(1, order[..., None].expand(-1, -1, embeds.shape[-1]))
    labels = torch.cat([_labels(part) for part in parts], dim=1)
    return LmInput(
        embeds.masked_fill(~mask[..., None], 0.0),
        mask.long(),
        places.gather(1, order).masked_fill(~mask, 0),
        labels.gather(1, order).masked_fill(~mask, IGNORED),
    )


def _labels(part: Part) -> torch.Tensor:
    if part.labels is not None:
        return part.labels
    return torch.full(part.mask.shape, IGNORED, device=part.mask.device)


def _spread(places: torch.Tensor, head: torch.Tensor, slots: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Compact positions `[B, parts]` with slots spread over the text, from the masks of head and slots."""
    ahead, count = head.sum(1, keepdim=True), slots.sum(1, keepdim=True)
    n = lengths[:, None]
    ratio = n / count.clamp(min=1)
    # Pieces of one text may have different numbers of slots, so there may be gaps between them.
    slot = (slots.long().cumsum(1) - 1).clamp(min=0)
    # A text that is shorter than its slots would put the first ones before its beginning.
    offset = torch.minimum((slot * ratio + (ratio - 1) / 2).round().long().clamp(min=0), (n - 1).clamp(min=0))
    start = head.shape[1]
    stop = start + slots.shape[1]
    return torch.cat([places[:, :start], ahead + offset, places[:, stop:] + n - count], dim=1)
