"""Reading a long text segment by segment, each after the soft prompt that the earlier ones left.

Shapes: B batch, L tokens of the text, n tokens of a segment, m vectors of the soft prompt, D width, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache, PreTrainedModel

from kvc.errors import UserError
from kvc.methods.autocompressor.segments import split_lengths
from kvc.methods.autocompressor.softprompt import SoftPrompt
from kvc.methods.autocompressor.stack import Columns, Stack
from kvc.methods.autocompressor.stopping import Draws
from kvc.methods.autocompressor.summary import Report, Segment, Summary

IGNORED = -100


@dataclass(frozen=True)
class Reading:
    """A text that was read.

    Attributes:
        hidden: Final hidden states of its own tokens, `[B, L, D]`.
        prompt: The soft prompt after the last segment that was summarised.
        segment_lengths: Tokens of each segment.
        unscored: bool `[B, L]`, tokens that are no targets of the loss (control tokens); None for none.
        reports: For each segment that was summarised with variable length, how.
    """

    hidden: torch.Tensor
    prompt: SoftPrompt
    segment_lengths: list[int]
    unscored: torch.Tensor | None
    reports: list[Report]

    @property
    def penalty(self) -> torch.Tensor:
        """Length penalty, mean over segments and rows that were summarised, scalar; 0 without any."""
        if not self.reports:
            return self.hidden.new_zeros((), dtype=torch.float32)
        total = torch.stack([report.penalty.sum() for report in self.reports]).sum()
        return total / torch.stack([report.active.sum() for report in self.reports]).sum().clamp(min=1)


class Compressor:
    """A causal LM that reads segments and summarises them.

    It owns no weights: those are the model's and the summary's.

    Args:
        model: A causal LM with standard attention, with or without PEFT LoRA.
        summary: How a segment is summarised.
        segment_gradient_checkpointing: In training, compute all segments but the last again in the backward pass.
        truncate_bptt_segments: The gradient graph of a soft prompt is cut once it was carried through this many
            segments; None never cuts it.
        detach_before_use: Cut it before any segment reads it. The loss of the LM then trains no compression: only for
            comparison with results that were made like this.

    Raises:
        UserError: If the settings do not fit together.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        summary: Summary,
        segment_gradient_checkpointing: bool = False,
        truncate_bptt_segments: int | None = None,
        detach_before_use: bool = False,
    ) -> None:
        if truncate_bptt_segments is not None and truncate_bptt_segments < 1:
            raise UserError(f"truncate_bptt_segments: must be at least 1 or null, got {truncate_bptt_segments}")
        if summary.needs_cache and any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
            raise UserError(
                "backbone.gradient_checkpointing: would drop the cache that a variable-length summary goes on from, "
                "use segment_gradient_checkpointing"
            )
        summary.check(model)
        self.model, self.summary, self.stack = model, summary, Stack(model)
        self.segment_gradient_checkpointing = segment_gradient_checkpointing
        self.truncate_bptt_segments, self.detach_before_use = truncate_bptt_segments, detach_before_use

    def read(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        *,
        inputs_embeds: torch.Tensor | None = None,
        segment_lengths: int | Sequence[int] | None = None,
        softprompt: SoftPrompt | None = None,
        output_softprompt: bool = False,
        soft: bool | None = None,
        generator: Draws = None,
    ) -> Reading:
        """Read a text. A padded batch gives what its rows give alone, on whichever side the padding is.

        Args:
            input_ids: `[B, L]`.
            attention_mask: `[B, L]`, 0 for padding; None for no padding.
            inputs_embeds: Embeddings `[B, L, D]` instead of tokens.
            segment_lengths: See `split_lengths`; cuts columns, so padding counts.
            softprompt: What stands before the first segment, of B rows or one; None for nothing.
            output_softprompt: Summarise the last segment too.
            soft: Variable length: weigh vectors so that gradients reach the stopping, or really stop; None is soft in
                training.
            generator: Variable length: draws random stops.

        Raises:
            UserError: If the segments do not fit the text or the model.
            ValueError: If not exactly one of tokens and embeddings is given, or batches differ.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        given = input_ids if input_ids is not None else inputs_embeds
        assert given is not None
        valid = None if attention_mask is None or bool(attention_mask.bool().all()) else attention_mask.bool()
        lengths = split_lengths(given.shape[1], segment_lengths)
        summarized = len(lengths) - (not output_softprompt)
        unscored = None
        if input_ids is not None:
            input_ids, unscored = self.summary.mark(input_ids, valid, lengths, summarized)
            inputs_embeds = self.summary.embed(self.model.get_input_embeddings(), input_ids)
        assert inputs_embeds is not None
        prompt = SoftPrompt.empty(inputs_embeds) if softprompt is None else softprompt.to(inputs_embeds)
        if prompt.vectors.shape[-1] != inputs_embeds.shape[-1]:
            raise UserError(
                f"softprompt: its vectors have width {prompt.vectors.shape[-1]}, but the input embeddings of the base "
                f"model {inputs_embeds.shape[-1]}"
            )
        prompt = prompt.expand(len(inputs_embeds))

        soft = self.model.training if soft is None else soft
        saving = self.segment_gradient_checkpointing and self.model.training and torch.is_grad_enabled()
        hidden, reports = [], []
        start = 0
        for index, length in enumerate(lengths):
            part = slice(start, start + length)
            start += length
            embeddings = inputs_embeds[:, part]
            ids = None if input_ids is None else input_ids[:, part]
            here = None if valid is None else valid[:, part]
            if self.detach_before_use:
                prompt = prompt.detach()
            arguments = (prompt, embeddings, here, ids, index < summarized, soft, generator)
            if saving and index < len(lengths) - 1:
                states, after, report = checkpoint(self._segment, *arguments, use_reentrant=False)
            else:
                states, after, report = self._segment(*arguments)
            if index < summarized:
                prompt = self._truncated(after, prompt)
            hidden.append(states)
            if report is not None:
                reports.append(report)
        whole = hidden[0] if len(hidden) == 1 else torch.cat(hidden, dim=1)
        return Reading(whole, prompt, lengths, unscored, reports)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits `[..., V]` of hidden states `[..., D]`."""
        return self.summary.logits(self.stack.logits, hidden)

    def loss(self, reading: Reading, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Negative log-likelihood of the labels given the tokens before them, over all segments in a row.

        The first token of a segment is predicted from the last one before it. Logits are made for targets only.

        Args:
            reading: A text.
            labels: `[B, L]`, -100 for tokens that are no targets; the first token of the text never is.

        Returns:
            Sum over targets and their number, both scalar. Without the length penalty.
        """
        losses, chosen = self.losses(reading, labels)
        return losses.sum(), chosen.sum()

    def losses(self, reading: Reading, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As `loss`, of each target.

        Returns:
            fp32 `[targets]`, and where they are: bool `[B, L - 1]`, from the second token on.
        """
        labels = masked_labels(reading, labels)[:, 1:]
        chosen = labels != IGNORED
        logits = self.logits(reading.hidden[:, :-1][chosen]).float()
        return F.cross_entropy(logits, labels[chosen], reduction="none"), chosen

    def _segment(
        self,
        prompt: SoftPrompt,
        embeddings: torch.Tensor,
        valid: torch.Tensor | None,
        input_ids: torch.Tensor | None,
        summarized: bool,
        soft: bool,
        generator: Draws,
    ) -> tuple[torch.Tensor, SoftPrompt, Report | None]:
        """Hidden states of the text, and the soft prompt after it."""
        # Autocast may have made the final hidden states more precise than embeddings are.
        prompt = prompt.to(embeddings)
        parts = [prompt.vectors, embeddings]
        columns = Columns.of_prompt(prompt) + Columns.of_text(embeddings, valid)
        active = None if valid is None else valid.any(-1)
        if summarized:
            slots = self.summary.slots(self.model.get_input_embeddings(), embeddings)
            parts.append(slots)
            mask = None if active is None else active[:, None].expand(-1, slots.shape[1])
            kind = Columns.of_text if self.summary.slots_are_text else Columns.of_slots
            columns = columns + kind(slots, mask)
        # Without a config no layer of the cache drops what a sliding window no longer sees: masks decide that.
        cache: Any = DynamicCache() if summarized and self.summary.needs_cache else None
        hidden = self.stack.read(torch.cat(parts, dim=1), columns, cache)
        before, length = prompt.vectors.shape[1], embeddings.shape[1]
        text = hidden[:, before : before + length]
        if not summarized:
            return text, prompt, None
        shown = torch.ones(embeddings.shape[:2], dtype=torch.bool, device=embeddings.device) if valid is None else valid
        segment = Segment(text, hidden[:, before + length :], active, shown, input_ids, columns, cache, prompt)
        after, report = self.summary.summarize(self.stack, segment, soft, generator)
        return text, after, report

    def _truncated(self, after: SoftPrompt, before: SoftPrompt) -> SoftPrompt:
        """The soft prompt after a segment, with its uses counted and its graph cut where they are up."""
        uses = before.uses + 1 if before.vectors.requires_grad else 0
        if self.truncate_bptt_segments is not None and uses >= self.truncate_bptt_segments:
            return after.detach()
        return replace(after, uses=uses)


def masked_labels(reading: Reading, labels: torch.Tensor) -> torch.Tensor:
    """Labels `[B, L]` with -100 at control tokens."""
    return labels if reading.unscored is None else labels.masked_fill(reading.unscored, IGNORED)
