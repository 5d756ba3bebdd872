"""Case files of the original CCM, read in our terms: no SUM tokens, columns of merged memory before the sequence."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from kvc.core.masks import Kind, Layout, is_merged

Tensors = dict[str, torch.Tensor]
KINDS: dict[str, Kind] = {"neg": "neg_control"}


def manifest(path: Path) -> dict[str, Any]:
    name = "manifest_gqa.json" if path.stem.startswith("gqa_") else "manifest_mha.json"
    return json.loads((path.parent / name).read_text())


@dataclass
class Case:
    """A parallel forward of two samples.

    Attributes:
        about: Entry of the manifest.
        kind: Our name of the mask.
        slots: Memory tokens in a run.
        tensors: As they are in the file.
        where: For each place of our sequence, the place of theirs, -1 for padding; int `[B, T]`.
        sums: For each column of merged memory, their SUM token, -1 where a row has none; int `[B, M]`.
        layout: Our description.
    """

    about: dict[str, Any]
    kind: Kind
    slots: int
    tensors: Tensors
    where: torch.Tensor
    sums: torch.Tensor
    layout: Layout

    def ours(self, name: str, dim: int = 1) -> torch.Tensor:
        """A tensor of theirs at our places; the batch is the dimension before `dim`. Padding holds garbage."""
        tensor = self.tensors[name].movedim((dim - 1, dim), (0, 1))
        rows = torch.stack([row[where] for row, where in zip(tensor, self.where.clamp(min=0))])
        return rows.movedim((0, 1), (dim - 1, dim))


def left_aligned(rows: list[torch.Tensor]) -> torch.Tensor:
    width = max(len(row) for row in rows)
    return torch.stack([torch.cat([row.new_full((width - len(row),), -1), row]) for row in rows])


def parallel_case(path: Path) -> Case:
    about, tensors = manifest(path)[path.stem], load_file(path)
    kind: Kind = KINDS.get(about["kind"], about["kind"])
    ids, valid = tensors["input_ids"], tensors["attention_mask"].bool()
    comp, sums = (torch.tensor(about[key] or []) for key in ("comp_ids", "sum_ids"))
    is_sum = torch.isin(ids, sums)
    where = left_aligned([row.nonzero().flatten() for row in ~is_sum & valid])
    slots = max(1, len(comp))
    ids = ids.gather(1, where.clamp(min=0))
    slot = torch.where(torch.isin(ids, comp), ids - 50, -1).masked_fill(where < 0, -1)
    kept = (ids == 1) if about["sink"] else None
    found = [row.nonzero().flatten() for row in is_sum] if is_merged(kind) else []
    width = max((len(row) for row in found), default=0)
    columns = [torch.cat([row, row.new_full((width - len(row),), -1)]) for row in found]
    merged = torch.stack(columns) if columns else torch.empty(len(ids), 0, dtype=torch.int64)
    return Case(about, kind, slots, tensors, where, merged, Layout(slot, where >= 0, slots, kept))
