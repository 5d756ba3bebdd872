"""One optimiser with named groups, and a schedule of known length."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR


@dataclass
class Optim:
    """Optimiser and schedule.

    Attributes:
        lr: Learning rate of every group that `lrs` does not name.
        lrs: Learning rate by group; a method says which groups it has (e.g. lora, embeddings, head).
        weight_decay: Decoupled decay; never applied to vectors (norms, biases) and to the group `queries`.
        betas: AdamW's averaging factors.
        kind: `adamw`, or `muon` for matrices with AdamW for embeddings, heads and vectors.
        warmup: Steps of linear warm-up if 1 or more, else the fraction of all steps.
        schedule: Shape after the warm-up.
        decay: With `linear`, the fraction of all steps over which the rate falls at the end.
        floor: Final learning rate as a fraction of the peak.
    """

    lr: float = 1e-4
    lrs: dict[str, float] = field(default_factory=dict)
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    kind: Literal["adamw", "muon"] = "adamw"
    warmup: float = 0.0
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    decay: float = 1.0
    floor: float = 0.0

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            ValueError: If a value is out of range.
        """
        if min([self.lr, *self.lrs.values()]) < 0:
            raise ValueError("optim.lr and optim.lrs must not be negative")
        if not 0 < self.decay <= 1:
            raise ValueError(f"optim.decay must be in (0, 1], got {self.decay}")
        if self.warmup < 0:
            raise ValueError(f"optim.warmup must not be negative, got {self.warmup}")

    def build(self, groups: Mapping[str, Iterable[nn.Parameter]], total_steps: int) -> tuple[Any, LambdaLR]:
        """Build optimiser and scheduler over named groups of parameters.

        Args:
            groups: Trainable parameters by group name.
            total_steps: Number of optimiser steps of the whole run.

        Raises:
            ValueError: If `lrs` names a group that the method does not have.
        """
        groups = {name: list(parameters) for name, parameters in groups.items()}
        if unknown := sorted(set(self.lrs) - set(groups)):
            raise ValueError(f"optim.lrs: no group '{unknown[0]}'; this method has {', '.join(sorted(groups))}")
        adamw: list[dict[str, Any]] = []
        muon: list[dict[str, Any]] = []
        for name, parameters in groups.items():
            lr = self.lrs.get(name, self.lr)
            matrices = [p for p in parameters if p.ndim >= 2]
            vectors = [p for p in parameters if p.ndim < 2]
            target = muon if self.kind == "muon" and name not in {"embeddings", "queries", "head"} else adamw
            if matrices:
                decay = 0.0 if name == "queries" else self.weight_decay
                target.append({"params": matrices, "lr": lr, "weight_decay": decay, "name": name})
            if vectors:
                adamw.append({"params": vectors, "lr": lr, "weight_decay": 0.0, "name": f"{name}/vectors"})
        optimizer: Any = MuonAdamW(muon, adamw, self.betas) if muon else torch.optim.AdamW(adamw, betas=self.betas)
        return optimizer, LambdaLR(optimizer, self.multiplier(total_steps))

    def multiplier(self, total_steps: int) -> Callable[[int], float]:
        """The factor on the learning rate at each step; a picklable pure function of the step."""
        warmup = round(self.warmup if self.warmup >= 1 else self.warmup * total_steps)
        return partial(_multiplier, warmup, total_steps, self.schedule, self.decay, self.floor)


def _multiplier(warmup: int, total: int, schedule: str, decay: float, floor: float, step: int) -> float:
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "constant":
        return 1.0
    if schedule == "linear":
        start = max(warmup, total * (1 - decay))
        left = (total - step) / max(1.0, total - start)
        return floor + (1 - floor) * min(1.0, max(0.0, left))
    done = min(1.0, (step - warmup) / max(1, total - warmup))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))


class MuonAdamW(torch.optim.Optimizer):
    """torch's Muon for matrices and AdamW for the rest behind one optimiser, as Lightning's automatic mode needs.

    Muon's update is rescaled to AdamW's RMS (`match_rms_adamw`), so one learning rate serves both. The parameter groups
    are shared with the two inner optimisers, so schedulers and checkpoints see all of them.
    """

    def __init__(self, muon: list[dict[str, Any]], adamw: list[dict[str, Any]], betas: tuple[float, float]) -> None:
        super().__init__([*muon, *adamw], {})
        self.inner: list[torch.optim.Optimizer] = [
            torch.optim.Muon(self.param_groups[: len(muon)], lr=1e-3, momentum=0.95, adjust_lr_fn="match_rms_adamw")
        ]
        if adamw:
            self.inner.append(torch.optim.AdamW(self.param_groups[len(muon) :], betas=betas))
        self._share()

    def _share(self) -> None:
        """One list of groups, one state: the inner optimisers' are the outer one's."""
        self.param_groups = [group for inner in self.inner for group in inner.param_groups]
        for inner in self.inner:
            self.state.update(inner.state)
            inner.state = self.state

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Run the closure once, then both inner steps."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for inner in self.inner:
            inner.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore groups and state, then share them with the inner optimisers again."""
        super().load_state_dict(state_dict)
        start = 0
        for inner in self.inner:
            inner.param_groups = self.param_groups[start : start + len(inner.param_groups)]
            inner.state = self.state
            start += len(inner.param_groups)
