"""AutoCompressors as one would use any model of transformers.

    >>> import torch
    >>> from kvc.core.backbone import Backbone
    >>> model = AutoCompressorModel(Backbone().load()).eval()  # or LlamaAutoCompressorModel.from_pretrained(...)
    >>> context, prompt = torch.randint(3, 90, (1, 40)), torch.randint(3, 90, (1, 5))
    >>> summary_vectors = model(context, output_softprompt=True).softprompt
    >>> model(prompt, softprompt=summary_vectors).logits.shape[:2]
    torch.Size([1, 5])
    >>> model.generate(prompt, softprompt=summary_vectors, max_new_tokens=3, eos_token_id=None).shape
    torch.Size([1, 8])

Shapes: B batch, L tokens, m summary vectors, D width, V vocabulary.
"""

import os
from collections.abc import Sequence
from typing import Any, ClassVar, Self

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from kvc.errors import UserError
from kvc.methods.autocompressor.checkpoint import load, save
from kvc.methods.autocompressor.compressor import Compressor, masked_labels
from kvc.methods.autocompressor.decoding import generate
from kvc.methods.autocompressor.fixed import FixedSummary
from kvc.methods.autocompressor.output import AutoCompressorOutput
from kvc.methods.autocompressor.positions import extend_table
from kvc.methods.autocompressor.rolling import generate_segments
from kvc.methods.autocompressor.settings import compressor_settings, parts_of, summary_of
from kvc.methods.autocompressor.softprompt import SoftPrompt
from kvc.methods.autocompressor.stopping import Draws
from kvc.methods.autocompressor.summary import Summary


class AutoCompressorModel(nn.Module):
    """A causal LM that compresses what it has read into summary vectors, for any family.

    Args:
        backbone: A causal LM with standard attention, with or without PEFT LoRA.
        summary: How segments are summarised; 50 summary tokens that accumulate if None.
        segment_gradient_checkpointing: In training, compute all segments but the last again in the backward pass.
        truncate_bptt_segments: See `Compressor`.

    Attributes:
        compressor: Reads segment by segment.
    """

    families: ClassVar[tuple[str, ...]] = ()
    """Model types that it takes; empty for all that are not excluded."""
    excluded: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        backbone: PreTrainedModel,
        summary: Summary | None = None,
        segment_gradient_checkpointing: bool = False,
        truncate_bptt_segments: int | None = None,
    ) -> None:
        super().__init__()
        self.check_family(str(backbone.config.model_type))
        self.backbone = backbone
        self.summary = summary or FixedSummary(backbone)
        self.compressor = Compressor(backbone, self.summary, segment_gradient_checkpointing, truncate_bptt_segments)
        self.train(backbone.training)

    @classmethod
    def check_family(cls, model_type: str) -> None:
        """Refuse a base model of another family.

        Raises:
            UserError: If it is one.
        """
        if (cls.families and model_type not in cls.families) or model_type in cls.excluded:
            raise UserError(f"{cls.__name__}: a base model of type '{model_type}' needs AutoCompressorModel")

    @property
    def config(self) -> Any:
        """The base model's configuration."""
        return self.backbone.config

    @property
    def device(self) -> torch.device:
        """Of the base model."""
        return self.backbone.device

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str],
        *,
        summary_length: int | None = None,
        accumulate_summary: bool | None = None,
        max_position_embeddings: int | None = None,
        dtype: str | torch.dtype = "auto",
        attn_implementation: str = "sdpa",
        revision: str | None = None,
    ) -> Self:
        """Load a published AutoCompressor, or make one of a base model.

        A folder whose configuration names the token `<sum>` has summaries of variable length.

        Args:
            source: A folder or Hub id, in the layout of the published AutoCompressors or a plain base model.
            summary_length: Summary tokens of a segment; None takes what the configuration says. With a base model they
                begin as its EOS token.
            accumulate_summary: Vectors of all segments stay; None takes what the configuration says, or else true.
            max_position_embeddings: Extend OPT's table of positions; None leaves it.
            dtype: Precision of the weights; `auto` takes the one they were saved in.
            attn_implementation: Attention kernel of transformers, such as sdpa or flash_attention_2.
            revision: Branch, tag or commit of a Hub repository.

        Returns:
            The model in eval mode.

        Raises:
            UserError: If there is no such checkpoint, or it does not fit.
        """
        found = load(source, cls.check_family, dtype, attn_implementation, revision)
        if max_position_embeddings is not None:
            extend_table(found.backbone, max_position_embeddings)
        summary = summary_of(found, summary_length, accumulate_summary)
        return cls(found.backbone, summary, **compressor_settings(found.backbone.config, summary)).eval()

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write the layout of the published AutoCompressors; a LoRA is merged into the weights.

        Args:
            folder: New, or one whose files may be replaced.

        Raises:
            UserError: If the layout cannot hold the summaries, or the folder cannot be written.
        """
        tensors, fields = parts_of(self.compressor)
        save(folder, self.backbone, tensors, {"architectures": [type(self).__name__], **fields})

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        *,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        segment_lengths: int | Sequence[int] | None = None,
        softprompt: torch.Tensor | SoftPrompt | None = None,
        softprompt_mask: torch.Tensor | None = None,
        output_softprompt: bool = False,
        soft: bool | None = None,
        generator: Draws = None,
    ) -> AutoCompressorOutput:
        """Read a text segment by segment.

        Args:
            input_ids: `[B, L]`.
            attention_mask: `[B, L]`, 0 for padding on either side; None for no padding.
            inputs_embeds: Embeddings `[B, L, D]` instead of tokens.
            labels: `[B, L]`, -100 for tokens that are no targets.
            segment_lengths: A number for equal segments, or a list that sums to L; None is one segment.
            softprompt: Summary vectors `[B, m, D]` or `[1, m, D]` before the first segment.
            softprompt_mask: `[B, m]`, 0 where a row has fewer; None takes vectors of zeros as absent.
            output_softprompt: Summarise the last segment too.
            soft: See `Compressor.read`.
            generator: See `Compressor.read`.

        Raises:
            UserError: If the segments do not fit the text or the model.
        """
        reading = self.compressor.read(
            input_ids,
            attention_mask,
            inputs_embeds=inputs_embeds,
            segment_lengths=segment_lengths,
            softprompt=as_prompt(softprompt, softprompt_mask),
            output_softprompt=output_softprompt,
            soft=soft,
            generator=generator,
        )
        logits = self.compressor.logits(reading.hidden)
        loss = None
        if labels is not None:
            targets = masked_labels(reading, labels)[:, 1:]
            total = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets.flatten(), reduction="sum")
            loss = total / (targets != -100).sum().clamp(min=1)
            if self.training if soft is None else soft:
                loss = loss + reading.penalty
        return AutoCompressorOutput(logits, loss, reading)

    def compress_context(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        segment_lengths: int | Sequence[int] | None = None,
        softprompt: torch.Tensor | SoftPrompt | None = None,
        generator: Draws = None,
    ) -> SoftPrompt:
        """Summary vectors of a whole text, without logits; see `forward`."""
        return self.compressor.read(
            input_ids,
            attention_mask,
            segment_lengths=segment_lengths,
            softprompt=as_prompt(softprompt),
            output_softprompt=True,
            generator=generator,
        ).prompt

    @torch.no_grad()
    def generate(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        softprompt: torch.Tensor | SoftPrompt | None = None,
        softprompt_mask: torch.Tensor | None = None,
        segment_lengths: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Continue prompts after summary vectors, with a KV cache.

        Args:
            input_ids: `[B, T]`, left-padded.
            attention_mask: `[B, T]`, 0 for padding; None for no padding.
            softprompt: Summary vectors before the prompts; None for none.
            softprompt_mask: See `forward`.
            segment_lengths: Compress whenever this many tokens of a row were read since the last time: the prompt, and
                what is generated. None never compresses.
            **kwargs: Settings of `generate` of transformers; with `segment_lengths`, those of
                `kvc.methods.autocompressor.rolling.generate_segments`.

        Returns:
            Prompts and new tokens `[B, T + new]`, or what `kwargs` ask for.

        Raises:
            UserError: If the settings do not fit together.
        """
        prompt = as_prompt(softprompt, softprompt_mask)
        if segment_lengths is None:
            return generate(self.compressor, input_ids, attention_mask, prompt, **kwargs)
        known = {"max_new_tokens", "sampler", "eos_token_id", "output_logits", "generator"}
        if unknown := sorted(kwargs.keys() - known):
            raise UserError(f"{unknown[0]}: not a setting of decoding with segment_lengths, which has {sorted(known)}")
        found = generate_segments(
            self.compressor, input_ids, attention_mask, prompt, segment_length=segment_lengths, **kwargs
        )
        return found.sequences


class LlamaAutoCompressorModel(AutoCompressorModel):
    """An AutoCompressor on a model with rotary positions: Llama, Mistral, Qwen2, Qwen3 and others."""

    excluded: ClassVar[tuple[str, ...]] = ("opt",)


class OPTAutoCompressorModel(AutoCompressorModel):
    """An AutoCompressor on OPT, whose summary vectors have no position."""

    families: ClassVar[tuple[str, ...]] = ("opt",)


def as_prompt(
    softprompt: torch.Tensor | SoftPrompt | None, softprompt_mask: torch.Tensor | None = None
) -> SoftPrompt | None:
    """What a user gives as soft prompt."""
    if softprompt is None or isinstance(softprompt, SoftPrompt):
        return softprompt
    return SoftPrompt.of(softprompt, softprompt_mask)
