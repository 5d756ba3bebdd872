"""What the terms of a loss look at: predictions of the answer's tokens, and the slots.

Student and teacher read prompts of different lengths, so their logits are aligned at the tokens of the answer and
nowhere else: `[N, V]` for the N answer tokens of a batch, row after row.

Shapes: B batch, T tokens, L answer tokens of a row, N of the batch, V vocabulary, M slots, D width.
"""

from dataclasses import dataclass
from typing import Any

import torch

IGNORED = -100


@dataclass
class Predicted:
    """Logits for the tokens of an answer, gold or self-generated, under teacher forcing.

    Attributes:
        logits: Of the student, who reads the slots, `[N, V]`.
        targets: The tokens, int64 `[N]`.
        row: Row of each token, int64 `[N]`, not falling.
        rows: B.
        teacher: Logits of the model that reads the text, `[N, V]`, without gradient; None where nobody asked for them.
    """

    logits: torch.Tensor
    targets: torch.Tensor
    row: torch.Tensor
    rows: int
    teacher: torch.Tensor | None = None

    def row_means(self, values: torch.Tensor) -> torch.Tensor:
        """Mean of `values` `[N]` over the tokens of each row, `[B]`; 0 for a row without tokens."""
        total = values.new_zeros(self.rows).index_add(0, self.row, values)
        return total / torch.bincount(self.row, minlength=self.rows).clamp(min=1)

    @property
    def log_probs(self) -> torch.Tensor:
        """Log-probability of each target, fp32 `[N]`."""
        return self.logits.float().log_softmax(-1).gather(-1, self.targets[:, None])[:, 0]


@dataclass
class Evidence:
    """Everything that a batch can say; a term needs some of it.

    Attributes:
        gold: Predictions of the gold answers.
        own: Predictions of answers that the student generated, each scored again behind its prompt.
        agreed: For each gold token, whether it counts for the first error: bool `[N]`, see `until_first_error`.
        advantage: Reward of each sampled answer minus that of the greedy one, `[B]`.
        slots: `[B, M, D]`.
        slot_mask: bool `[B, M]`.
        reference: What the slots of a row should resemble, such as the mean of the text's states, `[B, D]`.
        group: Number of each row's text, int64 `[B]`: rows of one text are not told apart.
    """

    gold: Predicted | None = None
    own: Predicted | None = None
    agreed: torch.Tensor | None = None
    advantage: torch.Tensor | None = None
    slots: torch.Tensor | None = None
    slot_mask: torch.Tensor | None = None
    reference: torch.Tensor | None = None
    group: torch.Tensor | None = None

    def of(self, name: str) -> Any:
        """A piece that a term needs.

        Raises:
            ValueError: If it is missing.
        """
        value = getattr(self, name)
        if value is None:
            raise ValueError(f"this loss needs '{name}', which the step did not provide")
        return value


def predicted(logits: torch.Tensor, labels: torch.Tensor, teacher: torch.Tensor | None = None) -> Predicted:
    """The predictions of labelled tokens: the logits at i - 1 predict token i.

    Args:
        logits: `[B, T, V]`.
        labels: `[B, T]`, -100 where nothing is predicted; the first token never is.
        teacher: `[N, V]`, of another model for the same tokens.
    """
    chosen = labels[:, 1:] != IGNORED
    row = chosen.nonzero()[:, 0]
    return Predicted(logits[:, :-1][chosen], labels[:, 1:][chosen], row, len(labels), teacher)
