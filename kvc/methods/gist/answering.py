"""Answers to a batch of questions, after a memory of gist rows or after plain text.

Shapes: B batch, T tokens.
"""

import time
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from transformers import PreTrainedModel

from kvc.cache.memory import KVMemory
from kvc.core.module import Record
from kvc.generation.decode import generate


class Graded(Protocol):
    """The score of one answer: `text` as it is scored, and numbers."""

    def _asdict(self) -> dict[str, Any]: ...


class GistQuestion(Protocol):
    """What evaluations need to know about a question."""

    @property
    def id(self) -> int:
        """Its number in the split."""
        ...

    @property
    def group(self) -> str:
        """What it is reported with."""
        ...

    @property
    def bare_prompt(self) -> str | None:
        """The prompt without the context, without BOS."""
        ...

    @property
    def gold(self) -> str:
        """The first right answer."""
        ...

    def score(self, completion: str) -> Graded:
        """Grade a completion."""
        ...


class Prompts(NamedTuple):
    """What is read before an answer.

    Attributes:
        input_ids: `[B, T]`, padded on the left.
        mask: `[B, T]`.
        memory: What came before; None for nothing.
    """

    input_ids: torch.Tensor
    mask: torch.Tensor
    memory: KVMemory | None = None


def answer(
    model: PreTrainedModel,
    tokenizer: Any,
    questions: Sequence[GistQuestion],
    prompts: Prompts,
    max_new_tokens: int,
    row_bytes: float,
) -> list[Record]:
    """Answer greedily and grade.

    Args:
        model: A causal LM in eval mode.
        tokenizer: Its tokenizer.
        questions: What is asked.
        prompts: How.
        max_new_tokens: Limit of each answer.
        row_bytes: Bytes of one row of the KV cache in all layers.

    Returns:
        For each question: `completion`, `answer`, the scores of its grader, `prompt_tokens`, `new_tokens`, `finish`;
        `kv_tokens_*`, rows of KV per layer and head, and `kv_bytes_*`, what these rows take (`peak`, `mean`, `final`);
        `prefill_seconds` and `decode_seconds`, its share of the batch.
    """
    ends = model.generation_config.eos_token_id
    known = [ends] if isinstance(ends, int) else list(ends or [])
    output = generate(
        model,
        prompts.input_ids,
        prompts.mask,
        max_new_tokens=max_new_tokens,
        memory=prompts.memory,
        eos_token_id={*known, tokenizer.eos_token_id},
        tokenizer=tokenizer,
    )
    assert output.texts is not None
    records: list[Record] = []
    for row, (question, text) in enumerate(zip(questions, output.texts)):
        graded = question.score(text)._asdict()
        # Not the bytes of the whole batch, in which a row would pay for the padding of the others.
        rows = {key: value for key, value in output.usage.summary(row).items() if key.startswith("kv_tokens")}
        records.append(
            {
                "completion": text,
                "answer": graded.pop("text"),
                **graded,
                "prompt_tokens": output.prompt_tokens[row],
                "new_tokens": len(output.tokens[row]),
                "finish": output.finish[row],
                **rows,
                **{key.replace("tokens", "bytes"): value * row_bytes for key, value in rows.items()},
                "prefill_seconds": output.prefill_seconds / len(questions),
                "decode_seconds": output.decode_seconds / len(questions),
            }
        )
    return records


def bare(tokenizer: Any, questions: Sequence[GistQuestion], device: torch.device) -> Prompts | None:
    """The questions without their contexts; None where one makes no sense alone."""
    texts = [question.bare_prompt for question in questions]
    start = [] if tokenizer.bos_token is None else [tokenizer.bos_token_id]
    rows = []
    for text in texts:
        if text is None:
            return None
        # A chat template may have written BOS itself.
        begun = bool(start) and text.startswith(tokenizer.bos_token)
        rows.append([*([] if begun else start), *tokenizer(text, add_special_tokens=False)["input_ids"]])
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
    return Prompts(ids, mask)


class Clock:
    """Seconds of work that is really done.

    Args:
        device: Where it is done.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.started = self._now()

    def seconds(self) -> float:
        """Since the clock was made."""
        return self._now() - self.started

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()
