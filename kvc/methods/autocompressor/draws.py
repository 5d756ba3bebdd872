"""What random stops teach a compression loop: how much better a draw was than the others for the same document.

Shapes: B documents, each in `copies` rows next to each other, L tokens.
"""

from itertools import accumulate

import torch

from kvc.methods.autocompressor.compressor import Reading


def stop_loss(reading: Reading, losses: torch.Tensor, scored: torch.Tensor, copies: int) -> torch.Tensor:
    """A loss whose gradient is that of the expected loss of the text, by the probabilities of stopping.

    REINFORCE with the mean of the other copies as baseline (Kool et al. 2019, "Buy 4 REINFORCE Samples, Get a Baseline
    for Free!"): without bias, and free of what makes one document harder than another.

    Args:
        reading: Of `B * copies` rows whose stops were drawn.
        losses: fp32 `[targets]`, see `Compressor.losses`.
        scored: bool `[B * copies, L - 1]`, where these are.
        copies: Rows of each document, 2 or more.

    Returns:
        Scalar, in the unit of the sum of the losses.
    """
    rows = losses.new_zeros(scored.shape).masked_scatter(scored, losses.detach())
    total = losses.new_zeros(())
    for report, end in zip(reading.reports, accumulate(reading.segment_lengths)):
        assert report.chance is not None
        # The first token of the next segment is predicted without the summary.
        after = rows[:, end:].sum(-1).view(-1, copies)
        better = (after - after.mean(-1, keepdim=True)) * copies / (copies - 1)
        total = total + (better.flatten() * report.chance).sum()
    return total
