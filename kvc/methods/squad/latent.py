"""Learned slots that read the text and then each other.

Shapes: B batch, S source tokens, M slots, D width.
"""

import torch
from torch import nn
from torch.nn import functional as F

from kvc.methods.squad.attention import SlotAttention, default_heads, sinusoids
from kvc.methods.squad.interface import Plan, SlotCompressor
from kvc.methods.squad.scale import output_norm


class Latent(SlotCompressor):
    """One transformer block over learned slots: to the text, to each other, then an MLP of twice the width.

    The attentions have the inner width D / 2 and no biases. Parameters: 2 M D + 4 D^2 + 8 D + (4 D^2 + 3 D). A smaller
    budget uses the first slots. These are not the gist tokens of Mu et al. 2023, which live inside the language model.

    Args:
        width: D, even.
        rms: Root mean square of the output at the start, that of the embeddings.
        slots: M.
        heads: Of both attentions; one for 128 inner dimensions but at least 4 if None.
        dropout: In the MLP.
    """

    def __init__(self, width: int, rms: float, slots: int = 64, heads: int | None = None, dropout: float = 0.1) -> None:
        super().__init__(width, slots)
        inner = width // 2
        heads = heads or default_heads(inner)
        self.dropout = dropout
        self.slots, self.places = nn.Parameter(torch.empty(slots, width)), nn.Parameter(torch.empty(slots, width))
        self.norm_source = nn.LayerNorm(width)
        self.read, self.norm_read = SlotAttention(width, inner, heads, bias=False), nn.LayerNorm(width)
        self.mix, self.norm_mix = SlotAttention(width, inner, heads, bias=False), nn.LayerNorm(width)
        self.widen, self.narrow = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.norm_out = output_norm(width, rms)
        nn.init.normal_(self.slots, std=0.02)
        nn.init.normal_(self.places, std=0.02)

    def compress(
        self, states: torch.Tensor, mask: torch.Tensor, plan: Plan
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Read the text, then mix the slots."""
        keys = self.norm_source(states) + sinusoids(states.shape[1], self.width, states)
        slots = (self.slots + self.places)[: plan.mask.shape[1]].expand(len(states), -1, -1)
        read, weights = self.read(slots, keys, mask, self.with_weights)
        slots = self.norm_read(slots + read)
        slots = self.norm_mix(slots + self.mix(slots, slots, plan.mask)[0])
        inner = F.dropout(F.gelu(self.widen(slots)), self.dropout, self.training)
        slots = slots + F.dropout(self.narrow(inner), self.dropout, self.training)
        return self.norm_out(slots), {} if weights is None else {"weights": weights}
