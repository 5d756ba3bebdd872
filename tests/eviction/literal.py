"""Redundancy as the original computes it, with an L x L matrix: the measure of the tiled form."""

import torch


def literal_redundancy(keys: torch.Tensor, direction: str = "last", ratio: float = 0.1) -> torch.Tensor:
    """`[B, Hk, L]` of keys `[B, Hk, L, d]`, in their dtype."""
    unit = keys / (keys.norm(dim=-1, keepdim=True) + 1e-8)
    cosine = unit @ unit.transpose(-1, -2)
    cosine.diagonal(dim1=-2, dim2=-1).zero_()
    length = cosine.shape[-1]
    similar = torch.where(cosine > 0.5, torch.arange(length), 0)
    if direction in ("last", "last_percent"):
        exempt = similar.amax(-1, keepdim=True)
    elif direction == "first":
        exempt = similar.amin(-1, keepdim=True)
    else:
        exempt = similar.sort(-1).values[..., max(1, int(length * ratio)) - 1, None]
    return cosine.scatter(-1, exempt, 0).mean(-2).softmax(-1)
