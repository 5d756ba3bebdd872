"""COMP traces as sequences to read and write: a prompt, a solution in segments, and what is predicted."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch.nn.utils.rnn import pad_sequence

from kvc.core.datamodule import Split
from kvc.data.comp import PAD_LABEL, CompTraces


class SegmentedTraces(CompTraces):
    """Traces whose `<COMP>` markers cut the solution into segments; settings as in `CompTraces`.

    The text holds no marker: where a segment ends is said beside it, and a method puts there what it needs.

    Batch, right-padded: `id` `[B]`; `input_ids` `[B, T]`, prompt, solution and EOS; `attention_mask` `[B, T]`; `labels`
    `[B, T]`, -100 in the prompt and on padding; `prompt` bool `[B, T]`, tokens of the prompt; `cut` bool `[B, T]`, the
    last token of each segment but the last one.
    """

    gives: ClassVar[tuple[str, ...]] = ("id", "input_ids", "attention_mask", "labels", "prompt", "cut")

    def dataset(self, split: Split) -> Any:
        """Traces of a split."""
        return _Sequences(self, self._ranges[split])

    def collate(self, split: Split) -> Callable[[list[Any]], Any]:
        """Pads on the right."""
        return _collate


class _Sequences:
    def __init__(self, data: CompTraces, ids: range) -> None:
        self.data, self.ids = data, ids

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, torch.Tensor]:
        item = self.data.labelled[self.ids[key[1]]]
        prompt, solution = len(item.prompt_ids), torch.tensor([*item.ids, self.data.tokenizer.eos_token_id])
        ids = torch.cat([torch.tensor(item.prompt_ids), solution])
        cut = torch.zeros(len(ids), dtype=torch.bool)
        # A segment that ends with the solution has nothing after it to remember it for.
        cut[prompt : len(ids) - 2] = torch.tensor(item.labels[:-1], dtype=torch.bool)
        return {
            "id": torch.tensor(item.id),
            "input_ids": ids,
            "labels": torch.cat([torch.full((prompt,), PAD_LABEL), solution]),
            "prompt": torch.arange(len(ids)) < prompt,
            "cut": cut,
        }


def _collate(items: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    def pad(key: str, value: float) -> torch.Tensor:
        return pad_sequence([item[key] for item in items], batch_first=True, padding_value=value)

    return {
        "id": torch.stack([item["id"] for item in items]),
        "input_ids": pad("input_ids", 0),
        "attention_mask": pad_sequence([torch.ones_like(item["input_ids"]) for item in items], batch_first=True),
        "labels": pad("labels", PAD_LABEL),
        "prompt": pad("prompt", False),
        "cut": pad("cut", False),
    }
