"""The tiny model and a few documents of facts that it can study."""

import functools
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvc.cache.memory import KVMemory
from kvc.core.backbone import Backbone
from kvc.data.synthetic.study_files import study_files
from kvc.methods.study.documents import Document
from kvc.methods.study.folder import MemoryFolder, load_studied
from kvc.methods.study.plan import Plan, plan
from kvc.methods.study.questions import Asked
from kvc.methods.study.settings import StudySettings
from kvc.methods.study.study import Study

DOCUMENTS, QUESTIONS = study_files(seed=3, documents=4, facts=4)
TEXTS = [Document(f"facts.jsonl line {n}", "text", row["text"]) for n, row in enumerate(DOCUMENTS, start=1)]
ASKED = [Asked(row["id"], row["question"], row["answer"]) for row in QUESTIONS]
SMALL: dict[str, Any] = {"budget": 40, "window": 8, "prefix": 12, "mode": "none", "chunk": 32}


@functools.cache
def tiny() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    backbone = Backbone()
    return backbone.load().eval(), backbone.load_tokenizer()


def planned(**settings: Any) -> Plan:
    model, tokenizer = tiny()
    return plan(model, tokenizer, TEXTS, StudySettings(**{**SMALL, **settings}))


def study(folder: Path, **settings: Any) -> tuple[KVMemory, dict[str, Any]]:
    model, _ = tiny()
    Study(model, planned(**settings)).run(MemoryFolder(folder))
    return load_studied(MemoryFolder(folder).memory, model)


@torch.no_grad()
def fresh(ids: list[int], positions: list[int] | None = None) -> KVMemory:
    """The memory of one plain forward, at these positions."""
    model, _ = tiny()
    memory = KVMemory(model)
    tokens = torch.tensor([ids])
    at = torch.arange(len(ids)) if positions is None else torch.tensor(positions)
    model(input_ids=tokens, past_key_values=memory, position_ids=at[None])
    return memory


def rows_at(values: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """The rows `[B, H, K, D]` at the slots `[B, H, K]`."""
    return values.gather(2, slots[..., None].long().expand(-1, -1, -1, values.shape[-1]))
