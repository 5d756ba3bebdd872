"""A budget drawn anew for each text of each training step, so that one model serves any of them.

Shapes: B batch, K budgets.
"""

import torch

from kvc.errors import UserError
from kvc.methods.squad.budget import Budget


class Sampled:
    """One of several budgets for each text, drawn from torch's random state; for `model.train_budget`.

    Each call of `counts` draws anew.

    Args:
        budgets: What is drawn from.
        weights: How likely each of them is, relative to the others; all the same if null.

    Raises:
        UserError: If there is none, or the weights do not fit.
    """

    def __init__(self, budgets: list[Budget], weights: list[float] | None = None) -> None:
        weights = [1.0] * len(budgets) if weights is None else weights
        if not budgets:
            raise UserError("budget.budgets: there is none to draw from")
        if len(weights) != len(budgets) or min(weights) < 0 or sum(weights) == 0:
            raise UserError(f"budget.weights must be {len(budgets)} numbers that are not negative and not all 0")
        self.budgets, self.weights = list(budgets), list(weights)

    @property
    def window(self) -> float | None:
        """None: every text has another one."""
        return None

    def counts(self, lengths: torch.Tensor) -> torch.Tensor:
        """Slots of each text, int64 `[B]`."""
        each = torch.stack([budget.counts(lengths) for budget in self.budgets])
        weights = torch.tensor(self.weights, device=lengths.device)
        if not len(lengths):
            return lengths
        drawn = torch.multinomial(weights, len(lengths), replacement=True)
        return each.gather(0, drawn[None])[0]

    def width(self, counts: torch.Tensor) -> int:
        """The largest count of the batch; waits for the device."""
        return max(1, int(counts.max())) if counts.numel() else 1
