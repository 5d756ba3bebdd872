"""Case files of the original AutoCompressors and of its variable-length fork, each with the model it was made on."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from kvc.methods.autocompressor import AutoCompressorModel
from kvc.methods.autocompressor.controls import TableControls
from kvc.methods.autocompressor.fixed import FixedSummary
from kvc.methods.autocompressor.stopping import Gate, Stopping
from kvc.methods.autocompressor.substeps import Substep
from kvc.methods.autocompressor.variable import VariableSummary

GATES: dict[str, Gate] = {"bb15bc1": "before", "57c4502": "after"}
"""Commits of the fork."""


def kind_of(path: Path) -> str:
    """What a file is about, by its tensors."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        names = set(file.keys())
    signs = {
        "generated": "generation",
        "final_softprompt": "decoding",
        "input_ids_1": "two_calls",
        "substep_loss": "substeps",
        "total_loss": "metrics",
        "seg0.gate": "soft",
        "seg0.z": "hard",
    }
    for name, kind in signs.items():
        if name in names:
            return kind
    if any(name.startswith("grad.") for name in names):
        return "training"
    return "forward" if "logits" in names else "insertion"


def case_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*/*.safetensors") if path.name != "model.safetensors")


@dataclass
class Case:
    """One file.

    Attributes:
        path: The file.
        meta: What the manifest says about it.
        tensors: Its tensors.
    """

    path: Path
    meta: dict[str, Any]
    tensors: dict[str, torch.Tensor]

    @classmethod
    def read(cls, path: Path) -> "Case":
        meta: dict[str, Any] = {}
        for manifest in sorted(path.parent.parent.glob("manifest*.json")):
            entry = json.loads(manifest.read_text()).get(f"{path.parent.name}/{path.name}", {})
            meta |= entry.get("meta", {})
        return cls(path, meta, load_file(path))

    def remark(self, name: str) -> dict[str, Any]:
        """What a manifest says without a file."""
        found: dict[str, Any] = {}
        for manifest in sorted(self.path.parent.parent.glob("manifest*.json")):
            entry = json.loads(manifest.read_text()).get(f"{self.path.parent.name}/{name}", {})
            found |= entry if isinstance(entry, dict) else {}
        return found

    @property
    def lengths(self) -> list[int] | int | None:
        return self.meta.get("segment_lengths")

    @property
    def gradients(self) -> dict[str, torch.Tensor]:
        return {name[5:]: tensor for name, tensor in self.tensors.items() if name.startswith("grad.")}

    def model(self) -> AutoCompressorModel:
        """In eval mode; rows accumulate unless the soft prompt says that they did not."""
        model = AutoCompressorModel.from_pretrained(self.path.parent, dtype=torch.float32)
        found = self.tensors.get("softprompt")
        if isinstance(self.lengths, list) and found is not None and isinstance(model.summary, FixedSummary):
            model.summary.accumulate = found.shape[1] > model.summary.length
        return model

    def variable(self, threshold: float | None = None) -> AutoCompressorModel:
        """The fork's model, with the gate of its commit and its tokens in the text."""
        base = AutoCompressorModel.from_pretrained(self.path.parent, dtype=torch.float32).backbone
        config: Any = base.config
        summary = VariableSummary(
            TableControls(config.sum_token_id, config.eoc_token_id),
            config.compression_max_len,
            config.compression_lambda,
            config.compression_alpha,
            GATES[self.meta.get("commit", "57c4502")],
            Stopping("threshold", 1.0 if threshold is None else threshold),
            "given",
        )
        model = AutoCompressorModel(base, summary)
        # One use, in the fork, is none: it cut the graph before the first one.
        model.compressor.detach_before_use = self.meta.get("truncate_bptt_segments") == 1
        return model

    def substeps(self) -> list[Substep]:
        """As they were cut, whether at random or not."""
        size, used = self.tensors["input_ids"].shape[1], self.meta.get("segment_lengths_used")
        count = len(self.tensors["substep_loss"])
        used = [self.meta["segment_lengths"]] * count if used is None else used
        if isinstance(used[0], int):
            each = len(used) // count
            used = [used[k * each : (k + 1) * each] for k in range(count)]
        edges = [size * k // count for k in range(count + 1)]
        return [Substep(start, stop, lengths) for start, stop, lengths in zip(edges, edges[1:], used)]


def gradients_of(model: AutoCompressorModel) -> dict[str, torch.Tensor]:
    """By the names of the published files."""
    named = {name.split(".", 1)[1]: parameter for name, parameter in model.named_parameters()}
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in named.items()}
