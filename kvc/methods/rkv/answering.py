"""Answers to a batch of questions under one way of keeping memory, with the record of each."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvc.core.module import Record
from kvc.data.questions import Question
from kvc.generation.decode import generate
from kvc.generation.protocols import Compressor
from kvc.generation.sampling import Sampler


def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    prompts: Sequence[str],
    compressor: Compressor | None,
    max_new_tokens: int,
    samples: int = 1,
    sampler: Sampler | None = None,
) -> list[Record]:
    """Answer every question `samples` times; answers to one question stand side by side.

    Args:
        model: Causal LM.
        tokenizer: Its tokenizer.
        questions: What is asked.
        prompts: How, one for each question.
        compressor: Makes the memory smaller; None keeps everything.
        max_new_tokens: Limit of each answer.
        samples: Answers to each question.
        sampler: Chooses tokens; greedy if None.

    Returns:
        For each answer: `completion`, `answer`, `correct`, `prompt_tokens`, `new_tokens`, `finish`, `compressions`,
        `kv_tokens_*` and `kv_bytes_*` (`peak`, `mean`, `final`), and `prefill_seconds` and `decode_seconds`, its share
        of the batch.
    """
    input_ids, mask = encode(tokenizer, prompts, model.device)
    output = generate(
        model,
        input_ids,
        mask,
        max_new_tokens=max_new_tokens,
        compressor=compressor,
        sampler=sampler,
        samples=samples,
        tokenizer=tokenizer,
    )
    assert output.texts is not None
    records: list[Record] = []
    for row, text in enumerate(output.texts):
        judged = questions[row // samples].judge(text)
        records.append(
            {
                "completion": text,
                "answer": judged.answer,
                "correct": judged.correct,
                "prompt_tokens": output.prompt_tokens[row],
                "new_tokens": len(output.tokens[row]),
                "finish": output.finish[row],
                "compressions": output.compressions[row],
                **output.usage.summary(row),
                "prefill_seconds": output.prefill_seconds / len(output.texts),
                "decode_seconds": output.decode_seconds / len(output.texts),
            }
        )
    return records


def encode(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Left-padded `input_ids` and `attention_mask` `[B, T]`; a BOS goes before a prompt that has none."""
    bos: Any = tokenizer.bos_token
    rows = []
    for prompt in prompts:
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        rows.append(ids if bos is None or prompt.startswith(bos) else [tokenizer.bos_token_id, *ids])
    longest = max(map(len, rows))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    input_ids = torch.tensor([[pad] * (longest - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
    return input_ids, mask
