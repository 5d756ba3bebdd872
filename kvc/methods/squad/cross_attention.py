"""Learned queries read the text once (Jaegle et al. 2021, Perceiver).

Shapes: B batch, S source tokens, M slots, D width.
"""

from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F

from kvc.errors import UserError
from kvc.methods.squad.attention import SlotAttention, default_heads, sinusoids
from kvc.methods.squad.bins import centres
from kvc.methods.squad.interface import Plan, SlotCompressor
from kvc.methods.squad.scale import output_norm


class CrossAttention(SlotCompressor):
    """Y = LN(A + Q) with A = attention of queries Q to the text, then Y + W2 GELU(W1 Y), then a norm.

    Parameters: M D + (4 D^2 + 4 D) + 6 D + 2 (D^2 + D). A smaller budget uses the first queries.

    Args:
        width: D.
        rms: Root mean square of the output at the start, that of the embeddings.
        slots: Queries, M.
        heads: Of the attention; one for 128 dimensions but at least 4 if None.
        dropout: Of attention weights and in the MLP.
        query_init: `tokens` adds the normed states at evenly spaced positions to the queries, against queries that
            become all alike.
        iterations: How often the text is read, with the same weights.
    """

    def __init__(
        self,
        width: int,
        rms: float,
        slots: int = 64,
        heads: int | None = None,
        dropout: float = 0.1,
        query_init: Literal["learned", "tokens"] = "learned",
        iterations: int = 1,
    ) -> None:
        super().__init__(width, slots)
        if iterations < 1:
            raise UserError(f"compressor.iterations must be at least 1, got {iterations}")
        self.query_init, self.iterations, self.dropout = query_init, iterations, dropout
        self.queries = nn.Parameter(torch.empty(slots, width))
        self.norm_source, self.norm_read = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = SlotAttention(width, width, heads or default_heads(width), dropout=dropout)
        self.widen, self.narrow = nn.Linear(width, width), nn.Linear(width, width)
        self.norm_out = output_norm(width, rms)
        nn.init.normal_(self.queries, std=0.02)
        with torch.no_grad():
            self.narrow.weight.mul_(0.01)
            nn.init.zeros_(self.narrow.bias)

    def compress(
        self, states: torch.Tensor, mask: torch.Tensor, plan: Plan
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Read the text into the queries."""
        normed = self.norm_source(states)
        keys = normed + sinusoids(states.shape[1], self.width, states)
        slots = self.queries[: plan.mask.shape[1]].expand(len(states), -1, -1)
        if self.query_init == "tokens":
            slots = slots + normed.gather(1, centres(plan)[..., None].expand(-1, -1, self.width))
        weights = None
        for _ in range(self.iterations):
            read, weights = self.attention(slots, keys, mask, self.with_weights)
            read = self.norm_read(read + slots)
            inner = F.dropout(F.gelu(self.widen(read)), self.dropout, self.training)
            slots = read + self.narrow(inner)
        return self.norm_out(slots), {} if weights is None else {"weights": weights}
