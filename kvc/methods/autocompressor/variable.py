"""Variable-length summaries: a loop that feeds final hidden states back, until the model stops it.

z_0 is the final hidden state at `<sum>`; z_t that of one more step, whose input is z_t-1. The z_t are the new memory,
which replaces the one before the segment.

Shapes: B batch, n text tokens of a segment, m vectors of the memory, T steps, D width.
"""

from collections.abc import Iterable
from itertools import repeat
from typing import Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from kvc.errors import UserError
from kvc.methods.autocompressor.controls import Controls
from kvc.methods.autocompressor.softprompt import SoftPrompt
from kvc.methods.autocompressor.stack import Columns, Head, Stack
from kvc.methods.autocompressor.stopping import Draws, Gate, Stopping, draw_stops, log_gates
from kvc.methods.autocompressor.summary import Marked, Report, Segment, Summary

Insertion = Literal["append", "overwrite", "given"]
"""How `<sum>` gets behind a segment: `append` as one more column, `overwrite` in place of the last token, or `given` in
the text, where a segment without it is not summarised."""


class VariableSummary(Summary):
    """Summary vectors of a number that the model chooses, for each row and segment.

    Args:
        controls: The tokens `<sum>` and `<eoc>`.
        compression_max_len: Most vectors of a segment.
        compression_lambda: Weight of the length penalty.
        compression_alpha: How much the vectors before a segment count as its length, in the penalty
            lambda E[length] / (tokens + alpha m).
        gate: How training weighs vectors.
        stopping: The rule of inference; greedy if null.
        insertion: How `<sum>` gets into the text.
        step_width: Width of embeddings that are added to the input of each step, in fp32; None for no such embeddings.

    Raises:
        UserError: If a value is out of range.
    """

    needs_cache = True

    trains_stops = True
    """Whether training changes when loops stop, and the length penalty counts."""

    draws_stops = False
    """Whether loops of training stop at random, so that a vector is there or not; else all are, with soft gates."""

    def __init__(
        self,
        controls: Controls,
        compression_max_len: int = 8,
        compression_lambda: float = 0.0,
        compression_alpha: float = 1.0,
        gate: Gate = "after",
        stopping: Stopping | None = None,
        insertion: Insertion = "append",
        step_width: int | None = None,
    ) -> None:
        super().__init__()
        if compression_max_len < 1:
            raise UserError(f"compression_max_len: must be at least 1, got {compression_max_len}")
        if compression_lambda < 0 or compression_alpha < 0:
            raise UserError("compression_lambda and compression_alpha cannot be negative")
        if gate not in ("after", "before", "log"):
            raise UserError(f"gate: '{gate}' is not one of after, before, log")
        if insertion not in ("append", "overwrite", "given"):
            raise UserError(f"insertion: '{insertion}' is not one of append, overwrite, given")
        self.controls = controls
        self.max_len, self.lam, self.alpha = compression_max_len, compression_lambda, compression_alpha
        self.gate: Gate = gate
        self.steps = None if step_width is None else nn.Parameter(torch.zeros(compression_max_len, step_width))
        self.stopping = stopping or Stopping()
        self.insertion: Insertion = insertion

    @property
    def slots_are_text(self) -> bool:
        """See `Summary`: `<sum>` takes a position."""
        return True

    def mark(self, input_ids: torch.Tensor, valid: torch.Tensor | None, lengths: list[int], count: int) -> Marked:
        """See `Summary`."""
        if self.insertion == "overwrite":
            pieces = zip(torch.split(input_ids, lengths, dim=1), _split(valid, lengths))
            input_ids = torch.cat(
                [self._closed(ids, here) if i < count else ids for i, (ids, here) in enumerate(pieces)], dim=1
            )
        unscored = None if self.insertion == "append" else self.controls.among(input_ids)
        return Marked(input_ids, unscored)

    def _closed(self, input_ids: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
        """A segment with `<sum>` in place of the last token of each row."""
        column = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        last = (column if valid is None else column.masked_fill(~valid, -1)).amax(-1, keepdim=True)
        return input_ids.masked_fill(column == last, self.controls.sum_token_id)

    def check(self, model: PreTrainedModel) -> None:
        """See `Summary`."""
        self.controls.check(model)

    def unwritable(self) -> list[int]:
        """See `Summary`."""
        return self.controls.unwritable()

    def embed(self, embedding: nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
        """See `Summary`."""
        return self.controls.embed(embedding, input_ids)

    def logits(self, head: Head, hidden: torch.Tensor) -> torch.Tensor:
        """See `Summary`."""
        return self.controls.logits(head, hidden)

    def slots(self, embedding: nn.Module, embeddings: torch.Tensor) -> torch.Tensor:
        """See `Summary`: `<sum>`, unless the text holds it."""
        count = 1 if self.insertion == "append" else 0
        return self.controls.start(embedding).to(embeddings).expand(len(embeddings), count, -1)

    def summarize(
        self, stack: Stack, segment: Segment, soft: bool, generator: Draws
    ) -> tuple[SoftPrompt, Report | None]:
        """See `Summary`.

        Raises:
            UserError: If `<sum>` is to stand in the text, and there are only embeddings; or if training would leave the
                control tokens as they are.
        """
        if soft and stack.model.training and torch.is_grad_enabled():
            self.controls.check_trainable(stack.model)
        first, active = self._begin(segment)
        text = segment.valid
        if segment.input_ids is not None:
            text = text & ~self.controls.among(segment.input_ids)
        tokens, before = text.sum(-1), segment.prompt.lengths
        everywhere = torch.ones_like(before, dtype=torch.bool) if active is None else active
        z, stop_logit, kept = self._loop(stack, segment, first, everywhere, soft, generator)
        paid = self.trains_stops or not self.training
        chance = None
        if soft:
            if not paid:
                # Gradients of 0 instead of none, for which other ranks would wait.
                stop_logit = stop_logit.detach() + 0 * stop_logit
            log_gate = log_gates(stop_logit, self.gate)
            gate = log_gate.exp()
            if self.training and self.draws_stops:
                kept, chance = draw_stops(stop_logit, self.gate)
                new = SoftPrompt(z * kept[..., None], kept & everywhere[:, None])
            else:
                mask = None if active is None else active[:, None].expand(-1, z.shape[1])
                logs = self.gate == "log"
                vectors = z if logs else gate[..., None].to(z.dtype) * z
                new = SoftPrompt(vectors, mask, log_gate if logs else None)
        else:
            gate = kept.float()
            most = int(kept.sum(-1).max())
            new = SoftPrompt((z * kept[..., None])[:, :most], kept[:, :most])
        expected = gate.sum(-1)
        penalty = paid * self.lam * expected / (tokens + self.alpha * before).clamp(min=1)
        report = Report(
            z,
            stop_logit.sigmoid(),
            gate,
            expected,
            tokens,
            before,
            everywhere,
            penalty.masked_fill(~everywhere, 0),
            None if chance is None else chance.masked_fill(~everywhere, 0),
        )
        return (new if active is None else new.where(active, segment.prompt)), report

    def _begin(self, segment: Segment) -> tuple[torch.Tensor, torch.Tensor | None]:
        """z_0 `[B, D]`, and the rows bool `[B]` that have one; None for all."""
        if self.insertion == "append":
            return segment.slots[:, -1], segment.active
        if segment.input_ids is None:
            raise UserError(f"insertion: '{self.insertion}' needs a text of tokens, use append for embeddings")
        marked = (segment.input_ids == self.controls.sum_token_id) & segment.valid
        column = torch.arange(marked.shape[1], device=marked.device)
        last = column.masked_fill(~marked, 0).amax(-1)
        first = segment.hidden.gather(1, last[:, None, None].expand(-1, 1, segment.hidden.shape[-1]))[:, 0]
        active = marked.any(-1)
        return first, None if bool(active.all()) else active

    def _loop(
        self,
        stack: Stack,
        segment: Segment,
        first: torch.Tensor,
        active: torch.Tensor,
        soft: bool,
        generator: Draws,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Raw vectors `[B, T, D]`, logits of stopping `[B, T]` and which vectors a hard stop keeps, bool `[B, T]`.

        A hard loop ends when no row goes on.
        """
        z, held, ended = first, segment.held, ~active
        vectors, logits, kept = [], [], []
        for step in range(self.max_len):
            # What rows without a summary read here is dropped.
            if self.steps is not None:
                z = z + self.steps[step]
            column = Columns.of_slots(z[:, None], None)
            z = stack.read(z[:, None].to(segment.prompt.vectors), column, segment.cache, held)[:, 0]
            held = held + column
            stop = self.controls.stop(stack.logits, z)
            vectors.append(z)
            logits.append(stop.logit)
            if soft:
                continue
            ends = ended | self.stopping(step, stop.logit, stop.top, ended, generator)
            kept.append(~(ended if self.gate == "before" else ends))
            ended = ends
            if bool(ended.all()):
                break
        return (
            torch.stack(vectors, dim=1),
            torch.stack(logits, dim=1),
            torch.stack(kept, dim=1) if kept else torch.ones_like(torch.stack(logits, dim=1), dtype=torch.bool),
        )


def _split(valid: torch.Tensor | None, lengths: list[int]) -> Iterable[torch.Tensor | None]:
    return repeat(None) if valid is None else torch.split(valid, lengths, dim=1)
