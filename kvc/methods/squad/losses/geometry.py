"""Numbers that show a collapse of the slots before the answers do; to be logged, without gradient.

Shapes: B batch, M slots, D width.
"""

import torch
from torch.nn import functional as F


@torch.no_grad()
def slot_cosine(slots: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean cosine between different slots of a row, scalar: 1 if they all say the same; 0 where no row has two.

    Args:
        slots: `[B, M, D]`.
        mask: bool `[B, M]`.
    """
    unit = F.normalize(slots.float(), dim=-1).masked_fill(~mask[..., None], 0.0)
    count = mask.sum(1)
    pairs = (count * (count - 1)).sum()
    return (unit.sum(1).square().sum() - unit.square().sum()) / pairs.clamp(min=1)


@torch.no_grad()
def alignment(ours: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
    """Mean squared distance of normed pairs `[B, D]`, scalar: 0 is best (Wang and Isola 2020)."""
    return (F.normalize(ours.float(), dim=-1) - F.normalize(references.float(), dim=-1)).square().sum(-1).mean()


@torch.no_grad()
def uniformity(ours: torch.Tensor, t: float = 2.0) -> torch.Tensor:
    """Log of the mean of exp(-t |z_i - z_j|^2) over pairs of normed rows `[B, D]`, scalar: 0 if all are the same."""
    return torch.pdist(F.normalize(ours.float(), dim=-1)).square().mul(-t).exp().mean().log()
