"""Losses on what the student itself would say.

The answers are decoded in eval mode without gradient and then scored again in one forward **behind the prompt**: only
so does a gradient reach the compressor.

Shapes: B batch, L answer tokens, N tokens of the batch.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from kvc.errors import UserError
from kvc.methods.squad.losses.evidence import IGNORED, Evidence
from kvc.methods.squad.losses.kd import check_divergence, divergence
from kvc.methods.squad.losses.mix import Loss, Term


@dataclass(frozen=True)
class OnPolicyKd(Term):
    """Divergence from the teacher along the student's own answers (Agarwal et al. 2024, GKD).

    L = mean over rows of 1/|y| sum_t D(teacher(. | text, y_<t), student(. | slots, y_<t)).

    Attributes:
        weight: Factor in the whole loss.
        gold_share: Share of rows that use the gold answer instead; the step draws them, see `mixed_answers`.
        beta: 0 for KL(teacher || student), 1 for KL(student || teacher); see `divergence`.
        temperature: See `divergence`.
    """

    weight: float = 1.0
    gold_share: float = 0.5
    beta: float = 0.0
    temperature: float = 1.0
    name: ClassVar[str] = "generation"
    needs: ClassVar[frozenset[str]] = frozenset({"own", "own.teacher"})

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            UserError: If a value is out of range.
        """
        check_divergence(self.name, self.beta, self.temperature)
        if not 0 <= self.gold_share <= 1:
            raise UserError(f"losses.{self.name}.gold_share must lie between 0 and 1, got {self.gold_share}")

    def __call__(self, evidence: Evidence) -> Loss:
        """Summed over rows, each a mean over its tokens."""
        own = evidence.of("own")
        if own.teacher is None:
            raise ValueError("on-policy distillation needs the teacher's logits of the student's answers")
        return _rows(own.row_means(divergence(own.logits, own.teacher, self.beta, self.temperature)))


@dataclass(frozen=True)
class FirstErrorCe(Term):
    """Cross-entropy of the gold tokens up to and with the first one that greedy decoding gets wrong; needs no teacher.

    Attributes:
        weight: Factor in the whole loss.
    """

    weight: float = 1.0
    name: ClassVar[str] = "generation"
    needs: ClassVar[frozenset[str]] = frozenset({"gold", "agreed"})

    def __call__(self, evidence: Evidence) -> Loss:
        """Summed over rows, each a mean over the tokens that count."""
        gold, agreed = evidence.of("gold"), evidence.of("agreed")
        nll = -gold.log_probs * agreed
        count = nll.new_zeros(gold.rows).index_add(0, gold.row, agreed.to(nll.dtype))
        return _rows(nll.new_zeros(gold.rows).index_add(0, gold.row, nll) / count.clamp(min=1))


@dataclass(frozen=True)
class SelfCritical(Term):
    """- advantage x mean_t log p(y_t): the reward of a sampled answer against the greedy one (Rennie et al. 2017).

    The reward is the F1 that is measured in the end. It has no gradient of its own, and none at all where sample and
    greedy answer are equally good: for fine-tuning after another loss.

    Attributes:
        weight: Factor in the whole loss.
    """

    weight: float = 1.0
    name: ClassVar[str] = "generation"
    needs: ClassVar[frozenset[str]] = frozenset({"own", "advantage"})

    def __call__(self, evidence: Evidence) -> Loss:
        """Summed over rows."""
        own = evidence.of("own")
        return _rows(-evidence.of("advantage").detach() * own.row_means(own.log_probs))


def until_first_error(gold: torch.Tensor, greedy: torch.Tensor) -> torch.Tensor:
    """The gold tokens up to and with the first that differs from the student's, bool `[B, L]`.

    Args:
        gold: Gold answers with their end token, `[B, L]`, -100 for padding, which is on the right.
        greedy: The student's answers, `[B, L']`; what is missing is an error.
    """
    width = gold.shape[1]
    missing = gold.new_full((len(gold), max(0, width - greedy.shape[1])), IGNORED - 1)
    wrong = (torch.cat([greedy, missing], dim=1)[:, :width] != gold).long()
    return (wrong.cumsum(1) - wrong == 0) & (gold != IGNORED)


def mixed_answers(
    gold: torch.Tensor, own: torch.Tensor, share: float, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gold answers for some rows and the student's for the others.

    Args:
        gold: `[B, L]`, -100 for padding.
        own: `[B, L']`, -100 for padding.
        share: Of gold rows, as a probability for each.
        generator: CPU generator of the draw.

    Returns:
        Answers `[B, max(L, L')]`, padded with -100, and which rows are gold, bool `[B]`.
    """
    chosen = (torch.rand(len(gold), generator=generator) < share).to(gold.device)
    width = max(gold.shape[1], own.shape[1])
    first, second = (torch.nn.functional.pad(ids, (0, width - ids.shape[1]), value=IGNORED) for ids in (gold, own))
    return torch.where(chosen[:, None], first, second), chosen


def _rows(values: torch.Tensor) -> Loss:
    return Loss(values.sum(), torch.tensor(len(values), device=values.device), per_token=False)
