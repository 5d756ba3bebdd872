"""Greedy answers to held-out items, and how often they are right."""

from collections.abc import Sequence
from typing import Any

import torch

from kvc.core.module import Record
from kvc.core.results import Summary, bootstrap_mean
from kvc.data.synthetic.tasks import TASKS

SHORT_ANSWER = 32
PADDED_TOKENS = 4096  # of one batch of prompts: long ones go alone, without padding, where attention is fastest


@torch.no_grad()
def grade(model: Any, tokenizer: Any, items: Sequence[Any], max_new_tokens: int) -> list[Record]:
    """Complete each prompt greedily and grade it as its task says.

    Args:
        model: Causal LM.
        tokenizer: Its tokenizer.
        items: With `id`, `task`, `group` and `example`; those whose task has no grader are left out.
        max_new_tokens: Limit for reasoning; other answers are short.
    """
    was_training = model.training
    model.eval()
    records = []
    for reasoning in (True, False):
        part = [item for item in items if (item.task == "reasoning") == reasoning and TASKS[item.task].grade]
        limit = max_new_tokens if reasoning else min(SHORT_ANSWER, max_new_tokens)
        completions = complete(model, tokenizer, [item.example.prompt for item in part], limit)
        for item, text in zip(part, completions):
            grade_answer = TASKS[item.task].grade
            assert grade_answer is not None
            right = grade_answer(text, item.example)
            records.append(
                {"id": item.id, "group": item.group, "completion": text, "gold": item.example.gold, "correct": right}
            )
    model.train(was_training)
    return records


def complete(model: Any, tokenizer: Any, prompts: Sequence[str], max_new_tokens: int) -> list[str]:
    """Greedy completions without special tokens, in left-padded batches of prompts of similar length."""
    ids = [[tokenizer.bos_token_id, *tokenizer(prompt, add_special_tokens=False)["input_ids"]] for prompt in prompts]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    texts = [""] * len(ids)
    while order:
        rows = 1
        while rows < len(order) and (rows + 1) * len(ids[order[rows]]) <= PADDED_TOKENS:
            rows += 1
        batch, order = order[:rows], order[rows:]
        for i, text in zip(batch, _complete(model, tokenizer, [ids[i] for i in batch], max_new_tokens)):
            texts[i] = text
    return texts


def _complete(model: Any, tokenizer: Any, ids: list[list[int]], max_new_tokens: int) -> list[str]:
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
