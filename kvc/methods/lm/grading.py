"""Greedy answers to held-out items, and how often they are right."""

from collections.abc import Sequence
from typing import Any

import torch

from kvc.core.module import Record
from kvc.core.results import Summary, bootstrap_mean
from kvc.data.answers import extract_answer, same_answer

SHORT_ANSWER = 8


@torch.no_grad()
def grade(model: Any, tokenizer: Any, items: Sequence[Any], max_new_tokens: int) -> list[Record]:
    """Complete each prompt greedily and compare with the gold answer.

    Args:
        model: Causal LM.
        tokenizer: Its tokenizer.
        items: With `id`, `group`, `prompt` and `answer`; a group whose name begins with `reasoning` is graded by
            its final number, any other by its whole first line.
        max_new_tokens: Limit for reasoning; other answers are short.
    """
    was_training = model.training
    model.eval()
    records = []
    for reasoning in (True, False):
        part = [item for item in items if item.group.startswith("reasoning") == reasoning]
        if not part:
            continue
        completions = complete(
            model, tokenizer, [item.prompt for item in part], max_new_tokens if reasoning else SHORT_ANSWER
        )
        for item, text in zip(part, completions):
            answer = extract_answer(text) if reasoning else text.strip().split("\n")[0].strip()
            right = answer is not None and (same_answer(answer, item.answer) if reasoning else answer == item.answer)
            records.append(
                {"id": item.id, "group": item.group, "completion": text, "answer": answer, "gold": item.answer}
                | {"correct": bool(right)}
            )
    model.train(was_training)
    return records


def complete(model: Any, tokenizer: Any, prompts: Sequence[str], max_new_tokens: int) -> list[str]:
    """Greedy completions of a left-padded batch, without special tokens."""
    ids = [[tokenizer.bos_token_id, *tokenizer(prompt, add_special_tokens=False)["input_ids"]] for prompt in prompts]
    longest = max(len(row) for row in ids)
    pad = tokenizer.pad_token_id
    device = model.device
    input_ids = torch.tensor([[pad] * (longest - len(row)) + row for row in ids], device=device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in ids], device=device)
    output = model.generate(
        input_ids=input_ids,
        attention_mask=mask,
        do_sample=False,
        max_new_tokens=max_new_tokens,
        pad_token_id=pad,
        eos_token_id=tokenizer.eos_token_id,
    )
    texts: list[str] = tokenizer.batch_decode(output[:, longest:], skip_special_tokens=True)
    return texts


def summarize(records: Sequence[Record], seed: int) -> Summary:
    """Exact match over all items and by group, with 95 % bootstrap intervals."""
    groups = list(dict.fromkeys(record["group"] for record in records))
    metrics = {"exact_match": bootstrap_mean([record["correct"] for record in records], seed)}
    for group in groups:
        hits = [record["correct"] for record in records if record["group"] == group]
        metrics[f"exact_match/{group.replace(' ', '_')}"] = bootstrap_mean(hits, seed)
    return Summary(metrics=metrics)
