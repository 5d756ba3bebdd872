"""Bins of the text, averaged with learned weights.

Shapes: B batch, S source tokens, M slots, D width, w entries of a row of weights.
"""

import torch
from torch import nn

from kvc.methods.squad.bins import Bins, even_bins
from kvc.methods.squad.interface import Plan, SlotCompressor
from kvc.methods.squad.scale import output_norm


class WeightedPooling(SlotCompressor):
    """Softmax weights inside each bin from a learned table, one shared projection, a norm.

    Untrained it is mean pooling: the table is 0 and the projection the identity. Parameters: M w + (D^2 + D) + 2 D.

    Args:
        width: D.
        rms: Root mean square of the output at the start, that of the embeddings.
        slots: Rows of the table, M. A smaller budget uses the first ones.
        max_length: Length of text that the table is made for; a row has w = max_length // M weights, which are
            interpolated for bins of another size.
        content_scores: Also score tokens by what they say, with one vector of D more parameters.
    """

    def __init__(
        self, width: int, rms: float, slots: int = 64, max_length: int = 512, content_scores: bool = False
    ) -> None:
        super().__init__(width, slots)
        self.table = nn.Parameter(torch.zeros(slots, max(1, max_length // slots)))
        self.scorer = nn.Parameter(torch.zeros(width)) if content_scores else None
        self.project = nn.Linear(width, width)
        nn.init.eye_(self.project.weight)
        nn.init.zeros_(self.project.bias)
        self.norm_out = output_norm(width, rms)

    def compress(
        self, states: torch.Tensor, mask: torch.Tensor, plan: Plan
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Weigh, project, norm."""
        bins = even_bins(plan.lengths, plan)
        member = bins.member(states.shape[1])
        scores = self._scores(bins, states.shape[1])
        if self.scorer is not None:
            scores = scores + (states @ self.scorer)[:, None]
        # Empty bins keep finite scores: what they hold is masked, and its gradient must not be NaN.
        weights = scores.masked_fill(~member & member.any(-1, keepdim=True), -torch.inf).softmax(-1)
        return self.norm_out(self.project(weights @ states)), {"weights": weights * member}

    def _scores(self, bins: Bins, size: int) -> torch.Tensor:
        """Row i of the table stretched over bin i, `[B, M, S]`: linear between the centres of its entries."""
        row = self.table[: bins.start.shape[1]].expand(len(bins.start), -1, -1)
        entries = row.shape[-1]
        offset = torch.arange(size, device=row.device) - bins.start[..., None]
        length = (bins.end - bins.start).clamp(min=1)[..., None]
        place = ((offset + 0.5) * entries / length - 0.5).clamp(0, entries - 1)
        low = place.floor().long()
        share = (place - low).to(row.dtype)
        return row.gather(-1, low).lerp(row.gather(-1, (low + 1).clamp(max=entries - 1)), share)
