"""How a model reads sequences with gist tokens: masked in one forward, or text first and the rest from its gist rows.

Both say the same: of each layer, the rows of the gist tokens are all that is left of the text, and what follows goes on
at the position behind them.

Shapes: B batch, T tokens, E width, K kept rows.
"""

from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from kvc.cache.memory import KVMemory
from kvc.core.attention import check_standard, check_window
from kvc.core.backbone import decoder
from kvc.core.masks import Kind, visibility
from kvc.methods.gist.sequence import HEAD, GistSequence

Control = Literal["gist", "pos_control", "neg_control"]
"""What follows the gist tokens sees them alone, everything, or nothing of what came before."""


class GistToken(nn.Module):
    """The embedding of the one token that is repeated; it starts as the mean of all others.

    It is kept in fp32 beside the vocabulary, so the LM head cannot say it.

    Args:
        embedding: Input embeddings of the base model.
    """

    def __init__(self, embedding: nn.Module) -> None:
        super().__init__()
        with torch.no_grad():
            rows = next(embedding.parameters())
            everything = torch.arange(rows.shape[0], device=rows.device)
            # Of what the module returns, not of its table: some families scale it.
            mean = embedding(everything).mean(0, dtype=torch.float32)
        self.vector = nn.Parameter(mean)

    def embed(self, embedding: nn.Module, sequence: GistSequence) -> torch.Tensor:
        """Input embeddings `[B, T, E]`."""
        ordinary: torch.Tensor = embedding(sequence.input_ids)
        return torch.where(sequence.gist[..., None], self.vector.to(ordinary.dtype), ordinary)


class GistReader:
    """A causal LM that reads sequences with gist tokens; it owns no weights.

    Args:
        model: A causal LM with standard attention, with or without PEFT LoRA.
        token: The gist token.
        control: What is visible behind the gist tokens.
        keep_head: What stands before the context stays visible, too.

    Raises:
        UserError: If the model does not fit.
    """

    def __init__(
        self, model: PreTrainedModel, token: GistToken, control: Control = "gist", keep_head: bool = False
    ) -> None:
        check_standard(model, "gist tokens")
        self.model, self.token = model, token
        self.control, self.keep_head = control, keep_head

    def hidden(self, sequence: GistSequence) -> torch.Tensor:
        """Final hidden states `[B, T, E]` of whole sequences, in one forward with a mask.

        Raises:
            UserError: If the attention kernel takes no such mask, or a sequence is longer than a sliding window.
        """
        check_window(self.model, sequence.input_ids.shape[1])
        embeds = self.token.embed(self.model.get_input_embeddings(), sequence)
        mask: Any = sequence.valid.long()
        if self.control != "pos_control":
            kind: Kind = self.control
            attention = str(self.model.config._attn_implementation)
            mask = visibility(sequence.layout(self.keep_head), kind).form(attention, embeds.dtype)
        stack: Any = decoder(self.model)
        found: torch.Tensor = stack(
            inputs_embeds=embeds, attention_mask=mask, position_ids=sequence.positions, use_cache=False
        ).last_hidden_state
        return found

    def compress(self, sequence: GistSequence) -> KVMemory:
        """Read texts up to their gist tokens, with ordinary attention, and keep what may be seen from then on.

        Args:
            sequence: Head, context and gist tokens, padded on the left.

        Returns:
            A memory whose next position is the one after the last gist token. A row without gist tokens keeps all.

        Raises:
            UserError: If a text is longer than a sliding window.
        """
        check_window(self.model, sequence.input_ids.shape[1])
        memory = KVMemory(self.model)
        embeds = self.token.embed(self.model.get_input_embeddings(), sequence)
        stack: Any = decoder(self.model)
        stack(inputs_embeds=embeds, **memory.forward_kwargs(sequence.input_ids, sequence.valid.long()), use_cache=True)
        kept = self.kept(sequence)
        if bool((kept == sequence.valid).all()):
            return memory
        most = int(kept.sum(1).max())
        # Padding is on the left, as in the memory, so columns are slots; what is kept moves to the right end.
        order = kept.long().argsort(dim=1, stable=True)[:, kept.shape[1] - most :]
        slots = order.masked_fill(~kept.gather(1, order), -1)
        for layer, rows in enumerate(memory.layers):
            memory.keep(layer, slots[:, None].expand(-1, rows.keys.shape[1], -1))
        return memory

    def kept(self, sequence: GistSequence) -> torch.Tensor:
        """Tokens that what follows can see, bool `[B, T]`."""
        plain = ~sequence.gist.any(1, keepdim=True) | (self.control == "pos_control")
        seen = sequence.gist & (self.control == "gist")
        if self.keep_head:
            seen = seen | (sequence.part == HEAD)
        return sequence.valid & (seen | plain)
