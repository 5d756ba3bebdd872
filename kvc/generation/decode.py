"""Decoding token by token on a memory that a compressor may shrink after every forward.

    output = generate(model, ids, mask, compressor=Eviction(RKV(), 512), max_new_tokens=4096, tokenizer=tokenizer)

Without a compressor the tokens are those of `model.generate`. Rows of a batch end at different times; a row that has
ended leaves the batch, and its memory is freed.

Shapes: B rows of the batch, T prompt tokens, V tokens of the vocabulary.
"""

import inspect
import time
from collections.abc import Collection

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from kvc.cache.accounting import Usage
from kvc.cache.memory import KVMemory
from kvc.cache.static import StaticMemory
from kvc.errors import UserError
from kvc.generation.output import Finish, Output
from kvc.generation.progress import DecodeProgress
from kvc.generation.protocols import Compressor, Progress
from kvc.generation.sampling import Greedy, Sampler
from kvc.generation.static import StaticStep
from kvc.generation.stopping import StopStrings
from kvc.generation.streaming import StreamTo
from kvc.generation.tails import TextTails


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    max_new_tokens: int,
    memory: KVMemory | None = None,
    compressor: Compressor | None = None,
    sampler: Sampler | None = None,
    samples: int = 1,
    eos_token_id: int | Collection[int] | None = None,
    stop: StopStrings | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    streamer: BaseStreamer | None = None,
    progress: DecodeProgress | None = None,
    static: StaticStep | None = None,
) -> Output:
    """Answer a batch of prompts.

    Args:
        model: Causal LM, in eval mode.
        input_ids: `[B, T]`, left-padded.
        attention_mask: `[B, T]`, 0 for padding; None for no padding.
        max_new_tokens: Limit of each answer.
        memory: What came before the prompt; it grows and shrinks in place (give a fork to keep it as it is). None
            begins with an empty one.
        compressor: Makes the memory smaller on the way.
        sampler: Chooses tokens; greedy if None.
        samples: Answers to each prompt; the prompt is read once. Rows of the same prompt stand side by side.
        eos_token_id: Tokens that end an answer; None takes those of the model's generation config, `()` is none.
        stop: Texts that end an answer.
        tokenizer: Decodes the answers; needed where a compressor reads text.
        streamer: Gets tokens as they come, for one row.
        progress: A progress bar that is open.
        static: Decode on buffers of a fixed size, as large as the compressor needs at most, and without one as prompt
            and answers together; rows that have ended keep their place until all have.

    Raises:
        UserError: If the settings do not fit together, or the compressor does not fit the model.
    """
    _check(model, input_ids, attention_mask, max_new_tokens, samples)
    if compressor is not None and compressor.characters and tokenizer is None:
        raise UserError("tokenizer: this compressor reads the text, so the decode loop needs a tokenizer")
    stream = StreamTo(streamer) if streamer is not None else None
    memory = KVMemory(model) if memory is None else memory
    if static is not None:
        static.check(memory, input_ids.device)
    loop = _Loop(model, memory, compressor, sampler or Greedy(), _ends(model, eos_token_id), stop)
    if compressor is not None:
        if tokenizer is not None and compressor.characters:
            loop.tails = TextTails(tokenizer, compressor.characters)
        compressor.begin(model, memory)
    try:
        if stream is not None:
            stream.put(input_ids.repeat_interleave(samples, dim=0))
        loop.prefill(input_ids, attention_mask, samples)
        if static is not None and max_new_tokens > 1:
            loop.freeze(static, max_new_tokens)
        for step in range(1, max_new_tokens + 1):
            new = loop.choose()
            if stream is not None:
                stream.put(torch.tensor(new))
            if step == max_new_tokens:
                loop.alive = []
            if loop.alive:
                loop.advance()
            if progress is not None:
                progress.step(
                    new_tokens=len(new),
                    alive=len(loop.alive),
                    cached=round(max(loop.cached)),
                    compressions=sum(loop.compressions),
                )
            if not loop.alive:
                break
    finally:
        loop.thaw()
        if compressor is not None:
            compressor.end()
        if stream is not None:
            stream.end()
    return loop.output(tokenizer)


def _check(
    model: PreTrainedModel, input_ids: torch.Tensor, mask: torch.Tensor | None, max_new_tokens: int, samples: int
) -> None:
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens: must be at least 1, got {max_new_tokens}")
    if samples < 1:
        raise UserError(f"samples: must be at least 1, got {samples}")
    if model.training:
        raise UserError("model: decoding in train mode would drop activations at random, call model.eval() first")
    if input_ids.numel() == 0 or (mask is not None and not bool(mask[:, -1].all())):
        raise UserError("attention_mask: prompts must not be empty, and shorter ones are padded on the left")


def _ends(model: PreTrainedModel, eos_token_id: int | Collection[int] | None) -> frozenset[int]:
    """Tokens that end an answer."""
    ids = model.generation_config.eos_token_id if eos_token_id is None else eos_token_id
    if ids is None:
        return frozenset()
    return frozenset([ids] if isinstance(ids, int) else ids)


class _Loop:
    """State of one call of generate; lists have one entry for each row of the batch, finished ones included."""

    def __init__(
        self,
        model: PreTrainedModel,
        memory: KVMemory,
        compressor: Compressor | None,
        sampler: Sampler,
        ends: frozenset[int],
        stop: StopStrings | None,
    ) -> None:
        self.model, self.memory, self.compressor = model, memory, compressor
        self.sampler, self.ends, self.stop = sampler, ends, stop
        self.static: tuple[StaticStep, StaticMemory] | None = None
        self.tails: TextTails | None = None
        self.usage = Usage()
        self.prefill_seconds = 0.0
        self.alive: list[int] = []
        """Rows that are still in memory, in their order there."""
        self.tokens: list[list[int]] = []
        self.finish: list[Finish] = []
        self.prompt_tokens: list[int] = []
        self.compressions: list[int] = []
        self.cached: list[float] = []
        self._places: list[int] = []
        self._seen: list[int] = []
        self._newest: list[int] = []
        self._logits = torch.empty(0)
        self._drawn = torch.empty(0)

    def prefill(self, input_ids: torch.Tensor, mask: torch.Tensor | None, samples: int) -> None:
        """Read the prompts."""
        self._started = time.perf_counter()
        last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(self.model.forward).parameters else {}
        inputs = self.memory.forward_kwargs(input_ids, mask)
        self._logits = self.model(input_ids=input_ids, **inputs, use_cache=True, **last).logits[:, -1]
        rows = torch.arange(len(input_ids), device=input_ids.device).repeat_interleave(samples)
        if samples > 1:
            self._logits = self._logits[rows]
            self.memory.batch_repeat_interleave(samples)
            if self.compressor is not None:
                self.compressor.select(rows)
        lengths = torch.full_like(rows, input_ids.shape[1]) if mask is None else mask.sum(1)[rows]
        self.prompt_tokens, self._newest = lengths.tolist(), input_ids[rows, -1].tolist()
        self._seen = self.memory.next_position.tolist()
        self.cached = self.memory.tokens.tolist()
        self.alive = list(range(len(rows)))
        self.tokens = [[] for _ in self.alive]
        self.compressions = [0] * len(rows)
        self.finish = ["length"] * len(rows)
        self.sampler.reset(len(rows))
        if self.stop is not None:
            self.stop.reset(len(rows))
        self.prefill_seconds = self._lap()
        self._note()
        self._compress()

    def freeze(self, step: StaticStep, max_new_tokens: int) -> None:
        """Decode on a static memory from here on."""
        # No forward sees the last token.
        lengths = [layer.length + max_new_tokens - 1 for layer in self.memory.layers]
        bounds = self.compressor.capacity() if self.compressor is not None else None
        capacity = lengths if bounds is None else [min(both) for both in zip(lengths, bounds, strict=True)]
        memory = StaticMemory.of(self.memory, capacity)
        self.static = step, memory
        self._places = list(self.alive)
        if self.compressor is not None:
            self.compressor.follow(memory)
        step.begin(self.model, memory)

    def thaw(self) -> None:
        """Give the rows back to the memory."""
        if self.static is None:
            return
        step, memory = self.static
        step.end()
        memory.to_memory()
        if -1 in self._places:
            going = [row for row, place in enumerate(self._places) if place >= 0]
            self.memory.batch_select_indices(torch.tensor(going, device=memory.next_position.device))
        self.static = None

    def choose(self) -> list[int]:
        """Draw the next token of every row in memory, and let those that have answered leave; returns the tokens."""
        self._drawn = self.sampler(self._logits, self.alive)
        new: list[int] = self._drawn.tolist()
        for row, token in zip(self.alive, new):
            self.tokens[row].append(token)
            self._newest[row] = token
        stops = self.stop(self.tokens) if self.stop is not None else None
        going = []
        for at, (row, token) in enumerate(zip(self.alive, new)):
            if token in self.ends:
                self.finish[row] = "eos"
            elif stops is not None and stops[row]:
                self.finish[row] = "stop"
            else:
                going.append(at)
        if len(going) < len(self.alive):
            self._leave(going)
        return new

    def advance(self) -> None:
        """Feed what was drawn, and let the compressor act."""
        if self.static is None:
            fed = self.model(input_ids=self._drawn[:, None], past_key_values=self.memory, use_cache=True)
            self._logits = fed.logits[:, -1]
        else:
            self._logits = self._static_step(self.static[0])
        for row in self.alive:
            self._seen[row] += 1
            self.cached[row] += 1
        self._note()
        self._compress()

    def output(self, tokenizer: PreTrainedTokenizerBase | None) -> Output:
        """What was decoded."""
        decode_seconds = self._lap()
        texts = None
        if tokenizer is not None:
            texts = tokenizer.batch_decode(self.tokens, skip_special_tokens=True)
            texts = texts if self.stop is None else [self.stop.cut(text) for text in texts]
        return Output(
            self.tokens,
            self.finish,
            self.prompt_tokens,
            self.compressions,
            self.usage,
            self.memory,
            self.prefill_seconds,
            decode_seconds,
            texts,
        )

    def _static_step(self, step: StaticStep) -> torch.Tensor:
        """Logits of the rows that go on; those that have ended are fed some token."""
        if len(self.alive) == len(self._places):
            return step(self._drawn[:, None])
        rows = torch.tensor(self.alive, device=self._drawn.device)
        tokens = self._drawn.new_zeros(len(self._places), 1).index_copy_(0, rows, self._drawn[:, None])
        return step(tokens)[rows]

    def _leave(self, going: list[int]) -> None:
        """Only these rows of the memory go on; without any, it stays as it is."""
        self.alive = [self.alive[at] for at in going]
        if not going:
            return
        rows = torch.tensor(going, device=self._drawn.device)
        self._drawn = self._drawn[rows]
        if self.static is not None:
            ended = [place for place in self._places if place >= 0 and place not in set(self.alive)]
            for place in ended:
                self._places[place] = -1
            self.static[1].retire(torch.tensor(ended, device=self._drawn.device))
            return
        self.memory.batch_select_indices(rows)
        if self.compressor is not None:
            self.compressor.select(rows)

    def _compress(self) -> None:
        if self.compressor is None:
            return
        tails = self.tails(self.tokens) if self.tails is not None else None
        progress = Progress(self._seen, [round(rows) for rows in self.cached], self._newest, tails)
        places = self.alive if self.static is None else self._places
        shrunk = self.compressor.after(progress, places)
        if shrunk:
            for row in shrunk:
                self.compressions[row] += 1
            for row, rows in zip(places, self._held.tokens.tolist()):
                if row >= 0:
                    self.cached[row] = rows
            self._note()

    @property
    def _held(self) -> KVMemory | StaticMemory:
        """The memory that holds the rows now."""
        return self.memory if self.static is None else self.static[1]

    def _note(self) -> None:
        self.usage.record(self.alive.copy(), [self.cached[row] for row in self.alive], self._held.bytes)

    def _lap(self) -> float:
        """Seconds since the last call, of work that is really done."""
        if self._logits.is_cuda:
            torch.cuda.synchronize()
        now = time.perf_counter()
        seconds, self._started = now - self._started, now
        return seconds
