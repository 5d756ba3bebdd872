"""Means of windows of contextual states: simple, and hard to beat (Feldman and Artzi 2025).

Shapes: B batch, S source tokens, M slots, D width.
"""

import torch
from torch import nn

from kvc.methods.squad.bins import windows
from kvc.methods.squad.interface import Plan, SlotCompressor
from kvc.methods.squad.scale import output_norm


class MeanPool(SlotCompressor):
    """C = W z, with z the mean of a window of r tokens; nothing is made for single slots, so any budget will do.

    Parameters: D^2 with `project`, and 2 D with `norm`. Without both it is exact mean pooling, an untrained baseline.

    Args:
        width: D.
        rms: Root mean square of the output at the start, that of the embeddings; needs `norm`.
        project: The matrix W, the identity at the start.
        norm: A norm at the end, for states that are larger than embeddings.
    """

    def __init__(self, width: int, rms: float, project: bool = True, norm: bool = True) -> None:
        super().__init__(width, None)
        self.project = nn.Linear(width, width, bias=False) if project else None
        if self.project is not None:
            nn.init.eye_(self.project.weight)
        self.norm_out = output_norm(width, rms) if norm else None

    def compress(
        self, states: torch.Tensor, mask: torch.Tensor, plan: Plan
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Average, project, norm."""
        slots = windows(plan).mean(states)
        slots = slots if self.project is None else self.project(slots)
        return (slots if self.norm_out is None else self.norm_out(slots)), {}
