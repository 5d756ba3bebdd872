"""The attention of slots to tokens, and of slots to each other.

Shapes: B batch, M queries, S keys, D width, H heads, E inner width.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F

from kvc.errors import UserError


def default_heads(inner: int) -> int:
    """One head for 128 dimensions, but at least 4."""
    return max(4, inner // 128)


class SlotAttention(nn.Module):
    """Multi-head attention with an inner width of its own.

    Args:
        width: D.
        inner: E; a multiple of the heads.
        heads: H.
        bias: Biases on all four projections.
        dropout: Of the attention weights, in training.
    """

    def __init__(self, width: int, inner: int, heads: int, bias: bool = True, dropout: float = 0.0) -> None:
        super().__init__()
        if heads < 1 or inner % heads:
            raise UserError(f"compressor.heads: {heads} do not divide an attention of width {inner}")
        self.heads, self.dropout = heads, dropout
        self.q, self.k, self.v = (nn.Linear(width, inner, bias) for _ in range(3))
        self.o = nn.Linear(inner, width, bias)
        for linear in (self.q, self.k, self.v, self.o):
            nn.init.xavier_uniform_(linear.weight)
            if bias:
                nn.init.zeros_(linear.bias)

    def forward(
        self, queries: torch.Tensor, keys: torch.Tensor, mask: torch.Tensor, with_weights: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend.

        Args:
            queries: `[B, M, D]`.
            keys: `[B, S, D]`, of which values are made, too.
            mask: bool `[B, S]`, keys that exist. A row without any attends to its padding, which is finite.
            with_weights: Also give the weights.

        Returns:
            `[B, M, D]`, and weights `[B, M, S]`, the mean over heads without dropout, or None.
        """
        q, k, v = (self._split(project(x)) for project, x in ((self.q, queries), (self.k, keys), (self.v, keys)))
        seen = (mask | ~mask.any(-1, keepdim=True))[:, None, None]
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, dropout_p=dropout)
        output = self.o(mixed.transpose(1, 2).flatten(2))
        if not with_weights:
            return output, None
        scores = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).masked_fill(~seen, -torch.inf)
        return output, scores.softmax(-1).mean(1)

    def _split(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(*x.shape[:-1], self.heads, -1).transpose(1, 2)


def sinusoids(size: int, width: int, like: torch.Tensor, scale: float = 0.1) -> torch.Tensor:
    """Sinusoidal positions `[size, width]` (Vaswani et al. 2017) times `scale`: word order without parameters."""
    place = torch.arange(size, device=like.device, dtype=torch.float32)
    pairs = (width + 1) // 2
    rate = torch.exp(torch.arange(pairs, device=like.device, dtype=torch.float32) * (-math.log(1e4) / pairs))
    angle = place[:, None] * rate
    return (scale * torch.cat([angle.sin(), angle.cos()], dim=-1)[:, :width]).to(like.dtype)
