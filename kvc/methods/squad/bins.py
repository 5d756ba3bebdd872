"""Which tokens each slot stands for.

Shapes: B batch, S source positions, M slots, D width.
"""

from typing import NamedTuple

import torch

from kvc.methods.squad.interface import Plan


class Bins(NamedTuple):
    """Half-open ranges of tokens, int64 `[B, M]`; start = end for slots that a row does not have."""

    start: torch.Tensor
    end: torch.Tensor

    def member(self, size: int) -> torch.Tensor:
        """Whether a position is in a bin, bool `[B, M, S]`, for S = `size`."""
        place = torch.arange(size, device=self.start.device)
        return (place >= self.start[..., None]) & (place < self.end[..., None])

    def mean(self, states: torch.Tensor) -> torch.Tensor:
        """Mean of each bin, `[B, M, D]`, of states `[B, S, D]`, finite on padding; 0 for empty bins."""
        member = self.member(states.shape[1]).to(states.dtype)
        return (member / member.sum(-1, keepdim=True).clamp(min=1)) @ states


def even_bins(lengths: torch.Tensor, plan: Plan) -> Bins:
    """The bins of adaptive average pooling: slot i of m covers [floor(i n / m), ceil((i + 1) n / m)).

    They cover everything and are never empty; where a text is shorter than its slots, they overlap.

    Args:
        lengths: n, items of each row to share out (tokens, or frames made of them), int64 `[B]`.
        plan: Slots of each row, m.
    """
    slot = torch.arange(plan.mask.shape[1], device=lengths.device)
    n, m = lengths[:, None], plan.counts[:, None].clamp(min=1)
    start, end = slot * n // m, -(-(slot + 1) * n // m)
    return Bins(start.masked_fill(~plan.mask, 0), end.masked_fill(~plan.mask, 0))


def windows(plan: Plan) -> Bins:
    """Windows of a fixed number of tokens, the last one shorter; even bins where the number of slots is fixed."""
    if plan.window is None:
        return even_bins(plan.lengths, plan)
    slot = torch.arange(plan.mask.shape[1] + 1, device=plan.lengths.device)
    n = plan.lengths[:, None]
    # The last window ends with the text, whatever is lost by rounding a ratio that is no whole number.
    edges = torch.where(slot < plan.counts[:, None], torch.minimum((slot.double() * plan.window).long(), n), n)
    return Bins(edges[:, :-1], edges[:, 1:])


def centres(plan: Plan) -> torch.Tensor:
    """A position in the middle of each slot's share of the text, int64 `[B, M]`; 0 for slots that a row lacks."""
    slot = torch.arange(plan.mask.shape[1], device=plan.lengths.device)
    middle = (2 * slot + 1) * plan.lengths[:, None] // (2 * plan.counts[:, None].clamp(min=1))
    return middle.masked_fill(~plan.mask, 0)
