"""One forward for a whole sequence with its memory tokens: what training runs.

Shapes: B batch, T tokens, V vocabulary, n slots, E width.
"""

from typing import Any

import torch
from transformers import PreTrainedModel

from kvc.core.attention import TAP, check_standard, check_window, open_door
from kvc.core.backbone import decoder, head_logits
from kvc.core.masks import Kind, Layout, is_merged, visibility
from kvc.errors import UserError
from kvc.methods.ccm.gate import GATE, gate_lora, is_gated
from kvc.methods.ccm.merging import Mean, MergeRule, merge_tap
from kvc.methods.ccm.positions import Positions, position_ids
from kvc.methods.ccm.tokens import MemoryTokens


class Compressor:
    """A causal LM that compresses its context into memory tokens.

    It owns no weights: those are the model's adapters and the table of memory tokens.

    Args:
        model: A causal LM with standard attention, with or without PEFT LoRA. It is prepared once: its adapters become
            conditional, and for the merge kinds its attention gets the project's door.
        tokens: The memory tokens.
        kind: How segments are compressed and seen; see `kvc.core.masks.visibility`.
        positions: Rule of positions; see `position_ids`.
        conditional: The LoRA acts on memory tokens only; False for an ordinary one.
        merge: How the merge kinds merge.

    Raises:
        UserError: If the model does not fit.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokens: MemoryTokens,
        kind: Kind = "concat_recur",
        positions: Positions = "skip",
        conditional: bool = True,
        merge: MergeRule | None = None,
    ) -> None:
        self.model, self.tokens = model, tokens
        self.kind, self.positions, self.conditional = kind, positions, conditional
        self.merge: MergeRule = merge or Mean()
        check_standard(model, "compressed context memory")
        if conditional:
            gate_lora(model)
        elif is_gated(model):
            raise UserError("cond_lora: the adapters of this model were made conditional before, load it anew")
        if is_merged(kind):
            open_door(model, ("sdpa", "eager", "flex_attention"))

    def layout(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        kept: torch.Tensor | None = None,
        cut: torch.Tensor | None = None,
    ) -> Layout:
        """What each place of a batch holds; see `Layout`."""
        return Layout(self.tokens.slot(input_ids), attention_mask.bool(), self.tokens.slots, kept, cut)

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Input embeddings `[B, T, E]`."""
        return self.tokens.embed(self.model.get_input_embeddings(), input_ids)

    def hidden(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        kept: torch.Tensor | None = None,
        cut: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run the stack below the LM head over whole sequences.

        Args:
            input_ids: `[B, T]`, padded on either side; ids from V on are memory tokens, in complete runs.
            attention_mask: `[B, T]`, 0 for padding.
            kept: bool `[B, T]`, ordinary tokens that stay visible for good; None for none.
            cut: bool `[B, T]`, ordinary tokens that end a segment without a run; None for none.
            **kwargs: Passed on to the model.

        Returns:
            The model's output, with `last_hidden_state` `[B, T, E]`.

        Raises:
            UserError: If a run of memory tokens is incomplete, or the sequences are longer than a sliding window of
                the model.
        """
        check_window(self.model, input_ids.shape[1])
        layout = self.layout(input_ids, attention_mask, kept, cut)
        layout.check()
        embeddings = self.embed(input_ids)
        attention = str(self.model.config._attn_implementation)
        arguments: dict[str, Any] = {
            "inputs_embeds": embeddings,
            "attention_mask": visibility(layout, self.kind).form(attention, embeddings.dtype),
            "position_ids": position_ids(layout, self.positions),
            "use_cache": False,
        }
        if self.conditional:
            arguments[GATE] = layout.memory.flatten().nonzero().flatten()
        if is_merged(self.kind):
            arguments[TAP] = merge_tap(layout, self.kind, self.merge)
        return decoder(self.model)(**{**arguments, **kwargs})

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits `[..., V]` of hidden states `[..., E]`."""
        return head_logits(self.model, hidden)
