"""What a compressor reads: the rows of the embedding table, or what a language model makes of them.

Shapes: B batch, S source tokens, D width.
"""

import re
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import PreTrainedModel

from kvc.core.attention import check_standard, kernel_of
from kvc.core.backbone import decoder
from kvc.errors import UserError

EMBEDDINGS = "embeddings"
LAST = "hidden:last"
_HIDDEN = re.compile(r"hidden:(last|\d+)")


@dataclass(frozen=True)
class Source:
    """Source states of a compressor.

    Attributes:
        states: `embeddings`: rows of the embedding table; `hidden:k`: states after layer k (0: what enters the first
            layer); `hidden:last`: after the last layer and the final norm.
        bidirectional: Tokens see what follows them, too.
        frozen: States of the base model without adapters, and without gradient; false trains the adapters that are on.
        residual: Add the embeddings of the tokens to their states, which are brought to half of an embedding's size, so
            that slots can begin as the text itself.
    """

    states: str = LAST
    bidirectional: bool = True
    frozen: bool = True
    residual: bool = False

    def __post_init__(self) -> None:
        """Check the name.

        Raises:
            UserError: If there is no such source.
        """
        if self.states != EMBEDDINGS and not _HIDDEN.fullmatch(self.states):
            raise UserError(f"source.states: {self.states!r} is unknown, use embeddings, hidden:last or hidden:NUMBER")
        if self.residual and self.states == EMBEDDINGS:
            raise UserError("source.residual: adds the embeddings to contextual states, leave it false for embeddings")

    def check(self, model: PreTrainedModel) -> None:
        """Refuse a model that cannot give these states.

        Raises:
            UserError: If it has fewer layers, or takes no mask that lets tokens see what follows.
        """
        if self.states == EMBEDDINGS:
            return
        layers = model.config.get_text_config(decoder=True).num_hidden_layers
        if self.states != LAST and int(self.states.split(":")[1]) > layers:
            raise UserError(f"source.states: {self.states}, but the model has {layers} layers")
        if self.bidirectional:
            check_standard(model, "a bidirectional source")

    def encode(
        self, model: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor, bos: int | None = None
    ) -> torch.Tensor:
        """Source states `[B, S, D]`; padding holds anything.

        Args:
            model: A causal LM, with or without PEFT LoRA, in the mode (train, eval) that is wanted.
            input_ids: `[B, S]`, padded on the right.
            attention_mask: `[B, S]`, 0 for padding.
            bos: Token that the model reads before each text and whose own state is left out; None for nothing. Without
                the first token that it was trained with, a model makes other states of the whole text.
        """
        if self.states == EMBEDDINGS:
            rows: torch.Tensor = model.get_input_embeddings()(input_ids)
            return rows.detach()
        states = self._contextual(model, input_ids, attention_mask, bos)
        if not self.residual:
            return states
        rows = model.get_input_embeddings()(input_ids).detach()
        return rows + 0.5 * _rms(rows) * states / _rms(states).clamp(min=1e-12)

    def _contextual(
        self, model: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor, bos: int | None
    ) -> torch.Tensor:
        adapters = getattr(model, "disable_adapter", nullcontext) if self.frozen else nullcontext
        with adapters(), torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            if bos is None:
                return self._hidden(model, input_ids, attention_mask)
            ids, mask = (nn.functional.pad(x, (1, 0), value=v) for x, v in ((input_ids, bos), (attention_mask, 1)))
            return self._hidden(model, ids, mask)[:, 1:]

    def _hidden(self, model: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        stack: Any = decoder(model)
        mask = two_way(model, attention_mask.bool()) if self.bidirectional else attention_mask
        # Padding is on the right, so positions are those of the text; a mask of four dimensions tells none.
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        arguments = {"input_ids": input_ids, "attention_mask": mask, "position_ids": positions, "use_cache": False}
        if self.states == LAST:
            last: torch.Tensor = stack(**arguments).last_hidden_state
            return last
        states: torch.Tensor = stack(**arguments, output_hidden_states=True).hidden_states[
            int(self.states.split(":")[1])
        ]
        return states


def _rms(states: torch.Tensor) -> torch.Tensor:
    """Root mean square of each state, `[..., 1]`."""
    return states.float().pow(2).mean(-1, keepdim=True).sqrt().to(states.dtype)


def two_way(model: PreTrainedModel, mask: torch.Tensor) -> torch.Tensor | BlockMask:
    """A mask in which every token sees every token of its row, in the form that the model's kernel takes.

    Args:
        model: A model with standard attention.
        mask: bool `[B, S]`, False for padding. A row of padding alone sees itself.

    Raises:
        UserError: If the kernel takes none.
    """
    kernel = kernel_of(str(model.config._attn_implementation))
    size = mask.shape[1]
    if kernel == "flex_attention":
        empty = ~mask.any(-1, keepdim=True)
        keys = mask | empty

        def visible(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
            return keys[b, kv]

        return create_block_mask(visible, len(mask), None, size, size, mask.device, _compile=mask.is_cuda)
    seen = (mask | ~mask.any(-1, keepdim=True))[:, None, None].expand(-1, 1, size, -1)
    if kernel == "sdpa":
        return seen
    if kernel == "eager":
        return torch.zeros_like(seen, dtype=model.dtype).masked_fill_(~seen, torch.finfo(model.dtype).min)
    raise UserError(
        f"backbone.attn_implementation: {kernel} takes no mask both ways, use sdpa, eager or flex_attention"
    )
