"""Merged memory: one run's worth of keys and values that stands for all runs so far.

Mem(t) = (1 - a_t) Mem(t-1) + a_t h(t), with Mem(1) = h(1), for every layer, head and slot; keys are merged as they are
rotated. In a parallel forward the merges of all steps are one small product of matrices, spliced in by the attention
function as columns before those of the sequence.

Shapes: B batch, H KV heads, T tokens, R runs, n slots, D head dimension.
"""

from dataclasses import dataclass
from typing import Protocol

import torch

from kvc.core.attention import Product
from kvc.core.masks import Kind, Layout
from kvc.errors import UserError


class MergeRule(Protocol):
    """How much a new run counts."""

    def share(self, step: torch.Tensor) -> torch.Tensor:
        """Share a_t of the run of step t = 1, 2, ..., float64 of the same shape; a_1 must be 1."""
        ...


@dataclass(frozen=True)
class Mean:
    """The arithmetic mean of all runs: a_t = 1 / t."""

    def share(self, step: torch.Tensor) -> torch.Tensor:
        """1 / t."""
        return 1 / step.double()


@dataclass(frozen=True)
class Ema:
    """Exponential moving average: a_t is constant from the second step on.

    Args:
        rate: Share of the newest run.
    """

    rate: float = 0.5

    def __post_init__(self) -> None:
        """Check the range.

        Raises:
            UserError: If the rate is not in (0, 1].
        """
        if not 0 < self.rate <= 1:
            raise UserError(f"rate: the share of the newest run must be in (0, 1], got {self.rate}")

    def share(self, step: torch.Tensor) -> torch.Tensor:
        """1 at the first step, then the rate."""
        return torch.where(step == 1, 1.0, torch.full_like(step, self.rate, dtype=torch.float64))


def weights(rule: MergeRule, runs: int, device: torch.device) -> torch.Tensor:
    """What each run counts in the memory after each step.

    Returns:
        fp32 `[R, R]`, lower triangular; row t is Mem(t), its columns add up to 1.
    """
    share = rule.share(torch.arange(1, runs + 1))
    later = torch.ones(runs, runs).triu(1).bool()
    # Row j: what is left of run j after each later step.
    left = torch.where(later, 1 - share, 1.0).cumprod(-1)
    return (share[:, None] * left).triu().T.float().to(device)


@dataclass(frozen=True)
class MergeTap:
    """Puts the merged memories of a parallel forward before the keys and values of its tokens.

    Args:
        places: Where each memory token stands, int64 `[B, R * n]`.
        weights: fp32 `[B or 1, rows, R]`: what each run counts in each memory that is made.
        slots: n.
    """

    places: torch.Tensor
    weights: torch.Tensor
    slots: int

    def __call__(self, layer: int, product: Product) -> Product:
        """Add `rows * n` columns."""
        key = torch.cat([self.merge(product.key), product.key], dim=2)
        value = torch.cat([self.merge(product.value), product.value], dim=2)
        return product._replace(key=key, value=value)

    def merge(self, states: torch.Tensor) -> torch.Tensor:
        """Merge keys or values `[B, H, T, D]` into `[B, H, rows * n, D]`."""
        batch, heads, _, size = states.shape
        index = self.places[:, None, :, None].expand(-1, heads, -1, size)
        # Sizes are spelled out because a batch may have no run at all.
        runs = states.gather(2, index).reshape(batch, heads, self.weights.shape[2], self.slots * size)
        # In full precision also under autocast: a mean of many bf16 keys loses bits that attention sees.
        with torch.autocast(states.device.type, enabled=False):
            merged = self.weights[:, None] @ runs.float()
        return merged.to(states.dtype).view(batch, heads, self.weights.shape[1] * self.slots, size)


def merge_tap(layout: Layout, kind: Kind, rule: MergeRule) -> MergeTap:
    """The tap that makes the columns which `visibility(layout, kind)` describes.

    Args:
        layout: What each place holds.
        kind: `merge` or `merge_recur`.
        rule: How runs are merged.
    """
    steps = weights(rule, layout.most_runs, layout.slot.device)[None]
    if kind == "merge" and layout.most_runs:
        steps = steps[0, (layout.runs - 1).clamp(min=0).long()]
    elif kind == "merge":
        steps = steps.new_zeros(len(layout.slot), 1, 0)
    return MergeTap(layout.places, steps, layout.slots)
