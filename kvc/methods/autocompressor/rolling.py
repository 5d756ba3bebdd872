"""Decoding that summarises what it has read on the way, so that the cache never holds more than a segment.

Shapes: B batch, T tokens of the prompts, m vectors of the soft prompt, K columns in the cache, N tokens of a segment.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import DynamicCache

from kvc.errors import UserError
from kvc.generation.sampling import Greedy, Sampler
from kvc.methods.autocompressor.compressor import Compressor
from kvc.methods.autocompressor.decoding import check_request, prefilled
from kvc.methods.autocompressor.softprompt import SoftPrompt
from kvc.methods.autocompressor.stack import Columns
from kvc.methods.autocompressor.stopping import Draws
from kvc.methods.autocompressor.summary import Segment


@dataclass(frozen=True)
class Decoded:
    """What was generated.

    Attributes:
        sequences: Prompts and new tokens, int64 `[B, T + new]`; after its end a row holds padding.
        logits: Of every new token, fp32 `[B, new, V]`; None unless asked for.
        prompt: The soft prompt at the end.
        prompt_lengths: Its vectors after the forward that gave each new token, int64 `[B, new]`.
        peak: Most columns that the cache held while text was read.
    """

    sequences: torch.Tensor
    logits: torch.Tensor | None
    prompt: SoftPrompt
    prompt_lengths: torch.Tensor
    peak: int


@torch.no_grad()
def generate_segments(
    compressor: Compressor,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    prompt: SoftPrompt | None,
    *,
    segment_length: int,
    max_new_tokens: int,
    sampler: Sampler | None = None,
    eos_token_id: int | Collection[int] | None = None,
    output_logits: bool = False,
    generator: Draws = None,
) -> Decoded:
    """Continue prompts, and summarise a row whenever it has read N tokens since its last summary.

    The token that completes a segment still gives its logits with the segment in sight. Then the cache of the row
    begins again with nothing but its soft prompt. Longer prompts are summarised in segments of N from their start.

    Args:
        compressor: The model, in eval mode.
        input_ids: `[B, T]`, left-padded.
        attention_mask: `[B, T]`, 0 for padding; None for no padding.
        prompt: The soft prompt before the prompts; None for none.
        segment_length: N.
        max_new_tokens: Most tokens to make.
        sampler: Chooses tokens; greedy if None.
        eos_token_id: Tokens that end a row; None takes those of the model's generation config, `()` is none.
        output_logits: Keep the logits.
        generator: Variable length: draws random stops.

    Raises:
        UserError: If the settings do not fit together.
    """
    check_request(compressor, input_ids, attention_mask)
    if segment_length < 1 or max_new_tokens < 1:
        raise UserError("segment_lengths and max_new_tokens must be at least 1")
    ends = compressor.model.generation_config.eos_token_id if eos_token_id is None else eos_token_id
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    state = _State.begin(compressor, prompt, len(input_ids), generator)
    rest, mask = state.catch_up(input_ids, attention_mask, segment_length)
    sampler, rows = sampler or Greedy(), list(range(len(input_ids)))
    sampler.reset(len(rows))
    alive = torch.ones(len(rows), dtype=torch.bool, device=input_ids.device)
    ending, padding = torch.tensor(ends, device=input_ids.device), _padding(compressor, ends)
    tokens, logits, lengths = [], [], []
    for step in range(max_new_tokens):
        logits.append(state.read(rest, mask, segment_length))
        lengths.append(state.prompt.lengths)
        new = sampler(logits[-1], rows).masked_fill(~alive, padding)
        tokens.append(new)
        alive = alive & ~torch.isin(new, ending)
        if step + 1 == max_new_tokens or not bool(alive.any()):
            break
        rest, mask = new[:, None], alive[:, None]
    kept = torch.stack(logits, dim=1).float() if output_logits else None
    sequences = torch.cat([input_ids, torch.stack(tokens, dim=1)], dim=1)
    return Decoded(sequences, kept, state.prompt, torch.stack(lengths, dim=1), state.peak)


@dataclass
class _State:
    """Rows that are being decoded.

    Attributes:
        prompt: Soft prompt of each row.
        cache: Keys and values of the columns held.
        held: Of a row, only its soft prompt and what it read since are valid.
        ids: Tokens of the columns held, 0 where there is none, int64 `[B, K]`.
        generator: Draws random stops.
        peak: Most columns held while text was read.
    """

    compressor: Compressor
    prompt: SoftPrompt
    cache: DynamicCache
    held: Columns
    ids: torch.Tensor
    generator: Draws
    peak: int = 0

    @classmethod
    def begin(cls, compressor: Compressor, prompt: SoftPrompt | None, batch: int, generator: Draws) -> "_State":
        embedding: Any = compressor.model.get_input_embeddings()
        if prompt is None:
            prompt = SoftPrompt.empty(embedding.weight.new_empty(batch, 0, embedding.weight.shape[1]))
        prompt = prompt.to(embedding.weight).expand(batch)
        state = cls(compressor, prompt, DynamicCache(), Columns.of_prompt(prompt), torch.empty(0), generator)
        state.restart()
        return state

    def restart(self) -> None:
        """Hold nothing but the soft prompts."""
        self.held = Columns.of_prompt(self.prompt)
        self.ids = self.held.valid.long() * 0
        self.cache = DynamicCache()
        if self.prompt.vectors.shape[1]:
            self.held, self.cache = prefilled(self.compressor, self.prompt)

    def catch_up(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, size: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Summarise all but the last 1 to N tokens of each prompt, which are returned, left-padded, with their mask."""
        valid = torch.ones_like(input_ids).bool() if attention_mask is None else attention_mask.bool()
        count = valid.sum(-1)
        done = (count - 1).clamp(min=0).div(size, rounding_mode="floor") * size
        packed = input_ids.gather(1, (~valid).long().argsort(dim=-1, stable=True))
        column = torch.arange(packed.shape[1], device=packed.device)
        if most := int(done.max()):
            self.prompt = self.compressor.read(
                packed[:, :most],
                column[:most] < done[:, None],
                segment_lengths=size,
                softprompt=self.prompt,
                output_softprompt=True,
                soft=False,
                generator=self.generator,
            ).prompt
            self.restart()
        width = int((count - done).max())
        place = count[:, None] - width + torch.arange(width, device=packed.device)
        mask = place >= done[:, None]
        return packed.gather(1, place.clamp(min=0)).masked_fill(~mask, 0), mask

    def read(self, input_ids: torch.Tensor, valid: torch.Tensor, size: int) -> torch.Tensor:
        """Logits `[B, V]` after tokens `[B, T]`; rows that have read N then are summarised."""
        compressor = self.compressor
        embeddings = compressor.summary.embed(compressor.model.get_input_embeddings(), input_ids)
        columns = Columns.of_text(embeddings, None if bool(valid.all()) else valid)
        hidden = compressor.stack.read(embeddings, columns, self.cache, self.held)
        self.held = self.held + columns
        self.ids = torch.cat([self.ids, input_ids], dim=1)
        self.peak = max(self.peak, self.ids.shape[1])
        due = (self.held.valid & self.held.text).sum(-1) >= size
        if bool(due.any()):
            self.summarize(due, embeddings)
        return compressor.logits(hidden[:, -1])

    def summarize(self, due: torch.Tensor, embeddings: torch.Tensor) -> None:
        """Put a summary in the place of what some rows, bool `[B]`, have read."""
        compressor, columns = self.compressor, self.held.valid.shape[1]
        slots = compressor.summary.slots(compressor.model.get_input_embeddings(), embeddings)
        if not slots.shape[1]:
            raise UserError("segment_lengths: decoding summarises only where <sum> is appended to the text")
        kind = Columns.of_text if compressor.summary.slots_are_text else Columns.of_slots
        behind = kind(slots, due[:, None].expand(-1, slots.shape[1]))
        states = compressor.stack.read(slots, behind, self.cache, self.held)
        text = self.held.valid & self.held.text
        segment = Segment(states[:, :0], states, due, text, self.ids, self.held + behind, self.cache, self.prompt)
        after, _ = compressor.summary.summarize(compressor.stack, segment, False, self.generator)
        # Rows end their segments at different steps, and each leaves slots that the others do not fill.
        self.prompt = after.packed()
        if bool(due.all()):
            self.restart()
            return
        self.cache.crop(columns - self.cache.get_seq_length())
        self.held = replace(self.held, valid=self.held.valid & ~due[:, None], padded=True)
        vectors = self.prompt.vectors
        if vectors.shape[1]:
            fresh = Columns.of_slots(vectors, self.prompt.valid & due[:, None])
            compressor.stack.read(vectors, fresh, self.cache, self.held)
            self.held = self.held + fresh
            self.ids = torch.cat([self.ids, self.ids.new_zeros(vectors.shape[:2])], dim=1)
        self._drop_columns()

    def _drop_columns(self) -> None:
        """Free the columns that no row holds any more."""
        kept = self.held.valid.any(0).nonzero().flatten()
        text = self.held.text[kept]
        self.held = replace(self.held, valid=self.held.valid[:, kept], text=text, tokens=int(text.sum()))
        self.ids = self.ids[:, kept]
        for layer in self.cache.layers:
            layer.keys, layer.values = layer.keys[:, :, kept], layer.values[:, :, kept]


def _padding(compressor: Compressor, ends: list[int]) -> int:
    """What a row holds after its end."""
    known = compressor.model.generation_config.pad_token_id
    return int(known) if known is not None else (ends[0] if ends else 0)
