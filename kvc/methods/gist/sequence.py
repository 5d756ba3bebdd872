"""The sequence of a batch: head, context, gist tokens, tail and answer of each row, one after the other.

Shapes: B batch, P tokens of a part, T tokens of the whole.
"""

from typing import NamedTuple

import torch

from kvc.core.masks import Layout

HEAD, CONTEXT, GIST, TAIL, ANSWER = range(5)
PARTS = (HEAD, CONTEXT, GIST, TAIL, ANSWER)
PADDING = -1
IGNORED = -100
NAMES = {HEAD: "head", CONTEXT: "context", TAIL: "tail", ANSWER: "answer"}


class GistSequence(NamedTuple):
    """A batch of sequences.

    Attributes:
        input_ids: int64 `[B, T]`, 0 at gist tokens and padding.
        part: int64 `[B, T]`, which part each token belongs to; `PADDING` for none.
    """

    input_ids: torch.Tensor
    part: torch.Tensor

    @property
    def valid(self) -> torch.Tensor:
        """Tokens that are no padding, bool `[B, T]`."""
        return self.part != PADDING

    @property
    def gist(self) -> torch.Tensor:
        """Gist tokens, bool `[B, T]`."""
        return self.part == GIST

    @property
    def positions(self) -> torch.Tensor:
        """int64 `[B, T]`, 0 on padding; gist tokens count."""
        return (self.valid.long().cumsum(1) - 1).masked_fill(~self.valid, 0)

    @property
    def labels(self) -> torch.Tensor:
        """int64 `[B, T]`: the answer, -100 elsewhere."""
        return self.input_ids.masked_fill(self.part != ANSWER, IGNORED)

    def layout(self, keep_head: bool) -> Layout:
        """What masks are made from: two segments, the first of which ends with the gist tokens.

        A row without gist tokens is one segment, in which every token sees all before it.

        Args:
            keep_head: What stands before the context stays visible.
        """
        counts = self.gist.sum(1, keepdim=True)
        most = max(1, int(counts.max()))
        # The last gist token of each row, however many there are, is the one that ends the segment.
        slot = most - counts + self.gist.long().cumsum(1) - 1
        kept = self.part == HEAD if keep_head else None
        return Layout(slot.masked_fill(~self.gist, -1), self.valid, most, kept)


def sequence(
    batch: dict[str, torch.Tensor], counts: torch.Tensor, parts: tuple[int, ...] = PARTS, left: bool = False
) -> GistSequence:
    """Put parts of a batch together.

    Args:
        batch: `head_ids`, `context_ids`, `tail_ids`, `answer_ids` `[B, P]` and a mask of each; padding anywhere.
        counts: Gist tokens of each row, int64 `[B]`.
        parts: Which parts, in order.
        left: Pad on the left instead of the right.
    """
    ids, owners = [], []
    for part in parts:
        if part == GIST:
            mask = torch.arange(int(counts.max()), device=counts.device) < counts[:, None]
            ids.append(torch.zeros_like(mask, dtype=torch.int64))
        else:
            mask = batch[f"{NAMES[part]}_mask"].bool()
            ids.append(batch[f"{NAMES[part]}_ids"].masked_fill(~mask, 0))
        owners.append(torch.full_like(ids[-1], part).masked_fill(~mask, PADDING))
    owner = torch.cat(owners, dim=1)
    valid = owner != PADDING
    longest = int(valid.sum(1).max())
    order = (valid if left else ~valid).long().argsort(dim=1, stable=True)
    order = order[:, order.shape[1] - longest :] if left else order[:, :longest]
    return GistSequence(torch.cat(ids, dim=1).gather(1, order), owner.gather(1, order))
