"""Compressors one after the other: the first ones shorten the text, the last one makes the slots.

Shapes: B batch, S source tokens, F frames, M slots, D width.
"""

from collections.abc import Callable

import torch
from torch import nn

from kvc.errors import UserError
from kvc.methods.squad.budget import FixedRatio, GivenSlots
from kvc.methods.squad.convolution import Convolution
from kvc.methods.squad.interface import Plan, SlotCompressor
from kvc.methods.squad.latent import Latent

Maker = Callable[[int, float], SlotCompressor]
UNIT = 1.0


class Hierarchical(SlotCompressor):
    """Local summaries first, then slots that read them: with a first ratio of 4, attention costs a quarter.

    Each of the first stages makes one frame for `ratio` of its inputs, with a root mean square of 1; the last one gets
    as many slots as the budget gives the text itself. Any compressors go together.

    Args:
        width: D.
        rms: Root mean square of the output at the start, that of the embeddings.
        stages: The first compressors, called with the width and 1; a `Convolution` of step 4 if null.
        ratios: Tokens or frames that each of them turns into one; 4 for each if null.
        last: The last compressor; `Latent` if null.

    Raises:
        UserError: If stages and ratios do not fit together.
    """

    def __init__(
        self,
        width: int,
        rms: float,
        stages: list[Maker] | None = None,
        ratios: list[float] | None = None,
        last: Maker | None = None,
    ) -> None:
        super().__init__(width, None)
        makers = [_local] if stages is None else stages
        ratios = [4.0] * len(makers) if ratios is None else ratios
        if not makers or len(ratios) != len(makers):
            raise UserError(f"compressor.ratios: {len(ratios)} of them for {len(makers)} stages, give one for each")
        self.budgets = [FixedRatio(ratio) for ratio in ratios]
        self.stages = nn.ModuleList(maker(width, UNIT) for maker in makers)
        self.last = (last or Latent)(width, rms)
        self.most = self.last.most

    def compress(
        self, states: torch.Tensor, mask: torch.Tensor, plan: Plan
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Frames of frames, then slots."""
        window = plan.window
        for stage, budget in zip(self.stages, self.budgets):
            states, mask, _ = stage(states, mask, budget)
            window = None if window is None else max(1.0, window / budget.ratio)
        slots = self.last(states, mask, GivenSlots(plan.counts, plan.mask.shape[1], window))
        return slots.slots, {}


def _local(width: int, rms: float) -> SlotCompressor:
    return Convolution(width, rms, slots=128, max_length=512)
