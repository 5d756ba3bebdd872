"""Batches of questions whose prompts come in parts: head, context, tail and answer, each as tokens of its own."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

PARTS = ("head", "context", "tail", "answer")
"""A prompt is head, context and tail; the context is what is compressed, the answer what is predicted."""
KEYS = ("id", "group", "span", "questions", *(f"{part}_{kind}" for part in PARTS for kind in ("ids", "mask")))
"""Keys of a batch."""


def collate_parts(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Pad each part on the right to its own longest.

    Args:
        items: Each with a tensor of tokens for every part, tensors `id`, `group` and `span`, and `questions`.

    Returns:
        `head_ids` and so on, int64 `[B, P]`, 0 on padding; `head_mask` and so on, bool `[B, P]`; `id` and `group`
        `[B]`, `span` `[B, 2]`; `questions`, a list.
    """
    batch: dict[str, Any] = {key: torch.stack([item[key] for item in items]) for key in ("id", "group", "span")}
    for part in PARTS:
        rows = [item[part] for item in items]
        batch[f"{part}_ids"] = pad_sequence(rows, batch_first=True)
        batch[f"{part}_mask"] = pad_sequence([torch.ones_like(row, dtype=torch.bool) for row in rows], batch_first=True)
    batch["questions"] = [item["questions"] for item in items]
    return batch
