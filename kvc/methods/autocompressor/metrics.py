"""Loss and accuracy of a text by segment.

Shapes: B batch, L tokens, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from kvc.methods.autocompressor.compressor import IGNORED


@dataclass(frozen=True)
class Scores:
    """Sums over predictions, of each row.

    Attributes:
        nll: Negative log-likelihood, fp32 `[B]`.
        right: Predictions that are right, int64 `[B]`.
        tokens: Predictions, int64 `[B]`.
    """

    nll: torch.Tensor
    right: torch.Tensor
    tokens: torch.Tensor

    @property
    def mean_nll(self) -> torch.Tensor:
        """Per prediction, fp32 `[B]`; not a number without any."""
        return self.nll / self.tokens

    @property
    def accuracy(self) -> torch.Tensor:
        """Share of right predictions, fp32 `[B]`; not a number without any."""
        return self.right / self.tokens


def token_scores(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Every prediction of the next token.

    Args:
        logits: `[B, L, V]`.
        labels: `[B, L]`, -100 for tokens that are no targets.

    Returns:
        Negative log-likelihood fp32, whether the most likely token is right, and whether there is a target, all
        `[B, L - 1]`; position t is about token t + 1.
    """
    targets, predicted = labels[:, 1:], logits[:, :-1]
    nll = F.cross_entropy(predicted.flatten(0, 1).float(), targets.flatten(), reduction="none", ignore_index=IGNORED)
    chosen = targets != IGNORED
    return nll.view_as(targets), (predicted.argmax(-1) == targets) & chosen, chosen


def segment_scores(
    logits: torch.Tensor, labels: torch.Tensor, segment_lengths: Sequence[int]
) -> tuple[Scores, list[Scores]]:
    """Scores of a whole text and of its segments.

    A prediction belongs to the segment in which it is made: the last one of a segment is about the first token of the
    next, and the last segment makes one fewer.

    Args:
        logits: `[B, L, V]`.
        labels: `[B, L]`, -100 for tokens that are no targets.
        segment_lengths: They sum to L.

    Returns:
        Of the text, and of each segment.
    """
    scores = token_scores(logits, labels)
    lengths = [*segment_lengths[:-1], segment_lengths[-1] - 1]
    parts = zip(*(torch.split(score, lengths, dim=1) for score in scores))
    return _summed(*scores), [_summed(*part) for part in parts]


def _summed(nll: torch.Tensor, right: torch.Tensor, chosen: torch.Tensor) -> Scores:
    return Scores(nll.sum(-1), right.sum(-1), chosen.sum(-1))
