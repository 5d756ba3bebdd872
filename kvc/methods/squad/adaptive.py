"""Which budget a text needs: by trying small ones first, or by a guess from the text (FlexComp, arXiv 2609.11192).

Budgets are ordered from the smallest to the largest; the last one may be the full text.

Shapes: B texts, K budgets, D features.
"""

import torch
from torch import nn


def smallest_sufficient(scores: torch.Tensor, margin: float = 0.1) -> torch.Tensor:
    """The smallest budget whose score is at least the best one less a margin, int64 `[B]`.

    Args:
        scores: `[B, K]`.
        margin: What may be lost.
    """
    # A margin in decimal may miss by rounding.
    enough = scores >= scores.amax(1, keepdim=True) - margin - 1e-6
    return enough.long().argmax(1)


def cascade(confidence: torch.Tensor, threshold: float) -> torch.Tensor:
    """The first budget whose answer is confident enough, and the last where none is, int64 `[B]`.

    Args:
        confidence: `[B, K]`, such as the mean log-probability of the answer's tokens.
        threshold: Least confidence.
    """
    sure = confidence >= threshold
    sure[:, -1] = True
    return sure.long().argmax(1)


def calibrate(confidence: torch.Tensor, scores: torch.Tensor, costs: torch.Tensor, loss: float = 0.01) -> float:
    """The threshold of the cheapest cascade that scores at most `loss` less than always taking the last budget.

    Args:
        confidence: `[B, K]`.
        scores: `[B, K]`.
        costs: `[B, K]`, slots.
        loss: What may be lost on average.
    """
    wanted = float(scores[:, -1].mean()) - loss - 1e-6
    best, lowest = float("inf"), float(costs[:, -1].mean())
    for threshold in sorted(set(confidence[:, :-1].flatten().tolist())):
        chosen = cascade(confidence, threshold)
        cost = float(pick(costs, chosen).mean())
        if cost < lowest and float(pick(scores, chosen).mean()) >= wanted:
            best, lowest = threshold, cost
    return best


def pick(values: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """The value `[B]` of the chosen budget of each text, from `[B, K]`."""
    return values.gather(1, chosen[:, None])[:, 0]


def balanced_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy in which every budget that occurs counts alike however often it does, scalar.

    Args:
        logits: `[B, K]`.
        labels: int64 `[B]`.
    """
    weights = 1 / torch.bincount(labels, minlength=logits.shape[1]).clamp(min=1).to(logits.dtype)
    return nn.functional.cross_entropy(logits, labels, weights)


class BudgetPredictor(nn.Module):
    """Two layers on the mean of a text's states and the logarithm of its length.

    Args:
        width: Of the states, D.
        budgets: K.
        hidden: Width of the inner layer.
    """

    def __init__(self, width: int, budgets: int, hidden: int = 128) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.inner, self.outer = nn.Linear(width + 1, hidden), nn.Linear(hidden, budgets)

    def forward(self, means: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Logits `[B, K]`.

        Args:
            means: `[B, D]`.
            lengths: Tokens of each text, int64 `[B]`.
        """
        size = lengths.clamp(min=1).log()[:, None].to(means.dtype)
        features = torch.cat([self.norm(means), size], dim=1)
        logits: torch.Tensor = self.outer(nn.functional.gelu(self.inner(features)))
        return logits
