"""Memory tokens: n embeddings of their own beside a frozen vocabulary.

Ids from the vocabulary's size on are memory tokens: V + k is slot k. The LM head keeps its V rows, so a memory token
can be neither generated nor a label.

Shapes: B batch, T tokens, V vocabulary, n slots, E width.
"""

import torch
from torch import nn

from kvc.errors import UserError


class MemoryTokens(nn.Module):
    """The table of memory tokens, kept and trained in fp32 whatever the base model's precision.

    Args:
        embedding: Input embeddings of the base model.
        slots: Memory tokens in a run, n.

    Raises:
        UserError: If `slots` is not positive.
    """

    def __init__(self, embedding: nn.Module, slots: int) -> None:
        super().__init__()
        if slots < 1:
            raise UserError(f"slots: a run needs at least one memory token, got {slots}")
        self.slots = slots
        self.vocabulary = _rows(embedding)
        self.table = nn.Parameter(strided_means(embedding, slots))

    def slot(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Slot of each token, int64 `[B, T]`; -1 for an ordinary one."""
        return (input_ids - self.vocabulary).clamp(min=-1)

    def run(self, batch: int) -> torch.Tensor:
        """Ids of one run, int64 `[B, n]`."""
        ids = torch.arange(self.vocabulary, self.vocabulary + self.slots, device=self.table.device)
        return ids.expand(batch, -1)

    def embed(self, embedding: nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
        """Input embeddings `[B, T, E]` in the precision of `embedding`: ordinary tokens get exactly theirs."""
        slot = self.slot(input_ids)
        ordinary: torch.Tensor = embedding(input_ids.where(slot < 0, 0))
        own = self.table[slot.clamp(min=0)].to(ordinary.dtype)
        return torch.where((slot >= 0)[..., None], own, ordinary)


@torch.no_grad()
def strided_means(embedding: nn.Module, slots: int) -> torch.Tensor:
    """Starting values: the table cut into n interleaved parts, whose means are the tokens, last part first.

    Args:
        embedding: Input embeddings; means are taken of what it returns, so a scaled embedding gives scaled tokens.
        slots: n.

    Returns:
        fp32 `[n, E]`; row n - 1 - k is the mean of rows k, k + n, k + 2n ...
    """
    rows = _rows(embedding)
    device = next(embedding.parameters()).device
    means = [
        embedding(torch.arange(start, rows, slots, device=device)).mean(0, dtype=torch.float32)
        for start in range(min(slots, rows))
    ]
    if len(means) < slots:
        raise UserError(f"slots: {slots} memory tokens are more than the {rows} rows of the base model's embeddings")
    return torch.stack(means[::-1])


def _rows(embedding: nn.Module) -> int:
    return int(next(embedding.parameters()).shape[0])
