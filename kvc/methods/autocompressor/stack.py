"""Running a stock model over columns of embeddings: soft prompt, text, summary slots.

Positions and masks are explicit, and nothing is kept between two runs but the cache that the caller holds.

Shapes: B batch, T columns, K columns in a cache, D width of the embeddings.
"""

from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from kvc.core.attention import kernel_of
from kvc.core.backbone import decoder, head_logits
from kvc.errors import UserError
from kvc.methods.autocompressor.positions import positions_of
from kvc.methods.autocompressor.softprompt import SoftPrompt


@dataclass(frozen=True)
class Columns:
    """What columns hold.

    Attributes:
        valid: bool `[B, T]`, False for padding.
        text: bool `[T]`, False for soft prompts and summary slots.
        padded: Whether any column of any row is padding.
        tokens: Columns of text. This and `padded` are known without asking the device.
        log_gate: fp32 `[B, T]`, added to the attention logits of the columns; None for nothing.
    """

    valid: torch.Tensor
    text: torch.Tensor
    padded: bool
    tokens: int
    log_gate: torch.Tensor | None = None

    @classmethod
    def of_text(cls, embeddings: torch.Tensor, valid: torch.Tensor | None) -> "Columns":
        """Text embeddings `[B, T, D]`, of which some may be padding."""
        return cls._of(embeddings, valid, text=True)

    @classmethod
    def of_slots(cls, embeddings: torch.Tensor, valid: torch.Tensor | None) -> "Columns":
        """Summary slots `[B, T, D]`, which some rows may lack."""
        return cls._of(embeddings, valid, text=False)

    @classmethod
    def of_prompt(cls, prompt: SoftPrompt) -> "Columns":
        """A soft prompt."""
        columns = cls._of(prompt.vectors, prompt.mask, text=False)
        return replace(columns, log_gate=prompt.log_gate)

    @classmethod
    def _of(cls, embeddings: torch.Tensor, valid: torch.Tensor | None, text: bool) -> "Columns":
        shape, device = embeddings.shape[:2], embeddings.device
        kinds = torch.full(shape[1:], text, device=device)
        if valid is None:
            return cls(torch.ones(shape, dtype=torch.bool, device=device), kinds, False, shape[1] if text else 0)
        return cls(valid, kinds, True, shape[1] if text else 0)

    def __add__(self, other: "Columns") -> "Columns":
        """These columns and others behind them."""
        gate = None
        if self.log_gate is not None or other.log_gate is not None:
            gate = torch.cat([self._gates, other._gates], dim=1)
        return Columns(
            torch.cat([self.valid, other.valid], dim=1),
            torch.cat([self.text, other.text]),
            self.padded or other.padded,
            self.tokens + other.tokens,
            gate,
        )

    @property
    def _gates(self) -> torch.Tensor:
        if self.log_gate is None:
            return torch.zeros(self.valid.shape, dtype=torch.float32, device=self.valid.device)
        return self.log_gate


class Head(Protocol):
    """See `Stack.logits`."""

    def __call__(self, hidden: torch.Tensor, one_more: torch.Tensor | None = None) -> torch.Tensor:
        """Logits of hidden states."""
        ...


class Stack:
    """A causal LM below its head, as a function of embeddings.

    Args:
        model: A causal LM with standard attention, with or without PEFT LoRA. OPT's row for no position is set to zero.

    Raises:
        UserError: If its positions are of an unknown kind.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.positions = positions_of(model)

    def read(
        self, embeddings: torch.Tensor, columns: Columns, cache: Cache | None = None, held: Columns | None = None
    ) -> torch.Tensor:
        """Final hidden states of columns.

        Args:
            embeddings: `[B, T, D]`.
            columns: What they are.
            cache: Keys and values of what came before; grows in place.
            held: The columns in the cache.

        Returns:
            `[B, T, D]`: what the LM head reads. Those of padding mean nothing.

        Raises:
            UserError: If there are more columns than the model can tell apart.
        """
        seen = columns if held is None else held + columns
        self.check_length(seen)
        size = columns.valid.shape[1]
        output = decoder(self.model)(
            inputs_embeds=embeddings,
            attention_mask=self._mask(seen, size, embeddings.dtype),
            position_ids=self.positions.ids(seen.valid, seen.text)[:, -size:],
            past_key_values=cache,
            use_cache=cache is not None,
            **self._one_sequence(seen, columns),
        )
        hidden: torch.Tensor = output.last_hidden_state
        return hidden

    def logits(self, hidden: torch.Tensor, one_more: torch.Tensor | None = None) -> torch.Tensor:
        """Logits of final hidden states, as the model's own forward makes them.

        Args:
            hidden: `[..., D]`.
            one_more: Row `[D]` of the LM head for a token behind its vocabulary; None for no such token.

        Returns:
            `[..., V]`, or `[..., V + 1]`.
        """
        if one_more is None:
            return head_logits(self.model, hidden)
        return head_logits(self.model, hidden, _Wider(self.model.get_output_embeddings(), one_more))

    def check_length(self, columns: Columns) -> None:
        """Refuse columns beyond a table of positions or a sliding window.

        Raises:
            UserError: If there are too many in a row.
        """
        limit = self.positions.limit
        if limit is not None and columns.tokens > limit:
            longest = int((columns.valid & columns.text).sum(-1).max())
            if longest > limit:
                raise UserError(
                    f"segment_lengths: a segment of {longest} tokens is longer than the {limit} positions of the base "
                    "model, use shorter segments or extend its table"
                )
        config: Any = self.model.config.get_text_config(decoder=True)
        window = getattr(config, "sliding_window", None)
        kinds = getattr(config, "layer_types", None) or ["sliding_attention"]
        if window is not None and "sliding_attention" in kinds and columns.valid.shape[1] > window:
            longest = int(columns.valid.sum(-1).max())
            if longest > window:
                raise UserError(
                    f"segment_lengths: a segment of {longest} columns with its soft prompt is longer than the sliding "
                    f"window of the base model ({window}), use shorter segments or another model"
                )

    def _mask(self, seen: Columns, size: int, dtype: torch.dtype) -> torch.Tensor | None:
        """None for plain causal attention, 0 and 1 `[B, K + T]`, or an additive mask `[B, 1, T, K + T]`."""
        if seen.log_gate is None:
            return seen.valid.long() if seen.padded else None
        kernel = kernel_of(str(self.model.config._attn_implementation))
        if kernel not in ("sdpa", "eager"):
            raise UserError(f"attn_implementation: {kernel} takes no gates in its mask, use sdpa or eager")
        total = seen.valid.shape[1]
        order = torch.ones(size, total, dtype=torch.bool, device=seen.valid.device).tril(total - size)
        visible = order & seen.valid[:, None, None]
        # Autocast may narrow the mask to bf16, in which the smallest fp32 number is infinite.
        hidden = max(torch.finfo(dtype).min, torch.finfo(torch.bfloat16).min)
        return torch.where(visible, seen.log_gate[:, None, None].to(dtype), hidden)

    def _one_sequence(self, seen: Columns, columns: Columns) -> dict[str, Any]:
        """Tell flash attention that a single row is one sequence, which it would guess from its positions."""
        size, total = columns.valid.shape[1], seen.valid.shape[1]
        flash = kernel_of(str(self.model.config._attn_implementation)).startswith("flash")
        if not flash or seen.padded or len(seen.valid) > 1 or size == 1 or self.positions.limit is None:
            return {}
        ends = [torch.tensor([0, n], dtype=torch.int32, device=seen.valid.device) for n in (size, total)]
        return {"cu_seq_lens_q": ends[0], "cu_seq_lens_k": ends[1], "max_length_q": size, "max_length_k": total}


class _Wider(nn.Module):
    """An LM head with one more row, which stays in its own precision.

    Args:
        head: The LM head.
        row: `[D]`.
    """

    def __init__(self, head: Any, row: torch.Tensor) -> None:
        super().__init__()
        # In a tuple neither becomes a part of this module.
        self.parts = (head, row)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        head, row = self.parts
        return torch.cat([head(hidden), hidden.to(row) @ row[:, None]], dim=-1)
