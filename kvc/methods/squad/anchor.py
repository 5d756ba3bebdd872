"""Anchors: a text is kept as the keys and values of a few of its own tokens (SAC, arXiv 2510.08907).

In the middle of each segment a token is marked with one learned vector. The model reads the text, every token sees
every other one, and of each layer only the rows of the marked tokens stay, at their own positions. What follows goes on
at the position after the text. So a slot holds keys and values of all layers, not one vector of the input.

Shapes: B batch, S text tokens, P head tokens, T of both, K kept rows, H KV heads, D width, E head dimension.
"""

from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from kvc.cache.memory import KVMemory
from kvc.core.attention import check_standard
from kvc.core.backbone import decoder
from kvc.methods.squad.bins import centres
from kvc.methods.squad.budget import Budget
from kvc.methods.squad.interface import Plan
from kvc.methods.squad.source import two_way


class Anchors(nn.Module):
    """Reads texts into a KV memory; parameters: D, beside the adapters of the model.

    Args:
        width: D.
        rms: Root mean square of the embeddings, the unit of the mark: one learning rate fits models of any scale.
        bidirectional: Tokens of head and text see what follows them, too.
    """

    def __init__(self, width: int, rms: float = 1.0, bidirectional: bool = True) -> None:
        super().__init__()
        self.mark, self.rms = nn.Parameter(torch.zeros(width)), rms
        self.bidirectional = bidirectional

    def forward(
        self,
        model: PreTrainedModel,
        head_ids: torch.Tensor,
        head_mask: torch.Tensor,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        budget: Budget,
    ) -> KVMemory:
        """Read a batch.

        Args:
            model: A causal LM with standard attention, with or without PEFT LoRA; the adapters that are on read.
            head_ids: What stands before the text, with BOS: all of it is kept, `[B, P]`.
            head_mask: `[B, P]`, 0 for padding.
            input_ids: The text, `[B, S]`.
            attention_mask: `[B, S]`, 0 for padding.
            budget: Anchors of each text; never more than it has tokens.

        Returns:
            A memory of the head and the anchors whose next position is the one after the text. Gradients flow through
            it.

        Raises:
            UserError: If the model does not fit.
        """
        check_standard(model, "a memory of anchors")
        head, lengths = head_mask.bool().sum(1), attention_mask.bool().sum(1)
        counts = torch.minimum(budget.counts(lengths), lengths)
        slots = torch.arange(budget.width(counts), device=counts.device) < counts[:, None]
        chosen = head[:, None] + centres(Plan(lengths, counts, slots, budget.window))
        cache = self._read(model, head_ids, head_mask.bool(), input_ids, attention_mask.bool(), chosen, slots)
        # What is kept is the head, then the anchors: -1 where a row has less of either.
        first = torch.arange(head_ids.shape[1], device=head.device).expand(len(head), -1)
        places = torch.cat([first, chosen], dim=1)
        kept = torch.cat([first < head[:, None], slots], dim=1)
        memory = KVMemory(model)
        for layer, read in enumerate(cache.layers):
            rows = places.masked_fill(~kept, 0)[:, None, :, None]
            keys, values = (
                part.gather(2, rows.expand(-1, part.shape[1], -1, part.shape[-1])) for part in (read.keys, read.values)
            )
            memory.append(layer, keys, values, places.masked_fill(~kept, -1))
        memory.next_position = head + lengths
        return memory

    def _read(
        self,
        model: PreTrainedModel,
        head_ids: torch.Tensor,
        head_mask: torch.Tensor,
        input_ids: torch.Tensor,
        text_mask: torch.Tensor,
        chosen: torch.Tensor,
        slots: torch.Tensor,
    ) -> Any:
        """Keys and values of all tokens of head and text, padded on the right."""
        mask = torch.cat([head_mask, text_mask], dim=1)
        order = (~mask).long().argsort(dim=1, stable=True)
        mask = mask.gather(1, order)
        embeds = model.get_input_embeddings()(torch.cat([head_ids, input_ids], dim=1).gather(1, order))
        marked = torch.zeros_like(mask).scatter_add(1, chosen.masked_fill(~slots, 0), slots)
        embeds = embeds + marked[..., None] * (self.rms * self.mark).to(embeds.dtype)
        stack: Any = decoder(model)
        return stack(
            inputs_embeds=embeds,
            attention_mask=two_way(model, mask) if self.bidirectional else mask.long(),
            position_ids=torch.arange(mask.shape[1], device=mask.device)[None],
            past_key_values=DynamicCache(config=model.config),
            use_cache=True,
        ).past_key_values
