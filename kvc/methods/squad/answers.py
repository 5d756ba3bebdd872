"""Answers generated from what was read, with the time that it took.

Shapes: B batch, L new tokens.
"""

import time
from typing import Any, NamedTuple

import torch
from transformers import GenerationConfig, PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from kvc.methods.squad.assembly import IGNORED
from kvc.methods.squad.reading import Reading, Tokens


class Answers(NamedTuple):
    """What a model said.

    Attributes:
        ids: New tokens with the end token where there is one, int64 `[B, L]`; -100 after it.
        prefill_seconds: Until the first token, for the batch.
        decode_seconds: From there on.
    """

    ids: torch.Tensor
    prefill_seconds: float
    decode_seconds: float


@torch.no_grad()
def answer(
    model: PreTrainedModel,
    reading: Reading,
    tail: Tokens,
    max_new_tokens: int,
    ends: list[int],
    sample: bool = False,
) -> Answers:
    """Answer a batch of questions, greedily or with samples from the model.

    Args:
        model: A causal LM in eval mode.
        reading: Of the contexts.
        tail: The questions.
        max_new_tokens: Limit of each answer.
        ends: Tokens that end an answer.
        sample: Draw each token from the model's distribution, with torch's global generator.
    """
    clock = _Clock(model.device)
    given, old = reading.prompt(model, tail)
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=sample,
        **({"temperature": 1.0, "top_k": 0, "top_p": 1.0} if sample else {}),
        eos_token_id=ends,
        pad_token_id=ends[0],
    )
    generate: Any = model.generate
    ids = generate(**given, generation_config=settings, stopping_criteria=StoppingCriteriaList([clock]))[:, old:]
    end = now(model.device)
    stop = torch.isin(ids, torch.tensor(ends, device=ids.device)).long()
    ids = ids.masked_fill(stop.cumsum(1) - stop > 0, IGNORED)
    first = clock.first or end
    return Answers(ids, first - clock.start, end - first)


def end_tokens(model: PreTrainedModel, tokenizer: Any) -> list[int]:
    """Tokens that end an answer: the one that training uses, then what the model's own settings name."""
    own: Any = model.generation_config.eos_token_id
    more = [] if own is None else [own] if isinstance(own, int) else list(own)
    return list(dict.fromkeys([tokenizer.eos_token_id, *more]))


def texts(tokenizer: Any, ids: torch.Tensor) -> list[str]:
    """The text of each row of ids `[B, L]`, without special tokens."""
    rows = [[token for token in row if token != IGNORED] for row in ids.tolist()]
    decoded: list[str] = tokenizer.batch_decode(rows, skip_special_tokens=True)
    return decoded


def now(device: torch.device) -> float:
    """The time when all that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class _Clock(StoppingCriteria):
    """Notes when the first token is there; never stops anything."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.first: float | None = None
        self.start = now(device)

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        if self.first is None:
            self.first = now(self.device)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
