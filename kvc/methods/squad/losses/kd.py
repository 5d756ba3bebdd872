"""Distillation: the student, who reads the slots, says what the same model says that reads the text.

Shapes: N tokens, V vocabulary.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn import functional as F

from kvc.errors import UserError
from kvc.methods.squad.losses.evidence import Evidence
from kvc.methods.squad.losses.mix import Loss, Term


def divergence(
    student: torch.Tensor, teacher: torch.Tensor, beta: float = 0.0, temperature: float = 1.0
) -> torch.Tensor:
    """Divergence of each token's distributions, fp32 `[N]`.

    `beta` 0 is KL(teacher || student) and 1 is KL(student || teacher). In between, with m = beta teacher + (1 - beta)
    student, it is the generalised Jensen-Shannon divergence beta KL(teacher || m) + (1 - beta) KL(student || m)
    (Agarwal et al. 2024, GKD).

    Args:
        student: Logits `[N, V]`.
        teacher: Logits `[N, V]`; no gradient flows into them.
        beta: Between 0 and 1.
        temperature: Both distributions are softened by it; the result is multiplied by its square.
    """
    ours = (student.float() / temperature).log_softmax(-1)
    theirs = (teacher.detach().float() / temperature).log_softmax(-1)

    def kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        return F.kl_div(q, p, reduction="none", log_target=True).sum(-1)

    if beta == 0:
        found = kl(theirs, ours)
    elif beta == 1:
        found = kl(ours, theirs)
    else:
        share = torch.tensor([beta, 1 - beta], device=ours.device).log()
        middle = torch.logaddexp(theirs + share[0], ours + share[1])
        found = beta * kl(theirs, middle) + (1 - beta) * kl(ours, middle)
    return found * temperature**2


def check_divergence(name: str, beta: float, temperature: float) -> None:
    """Refuse settings of `divergence` that mean nothing.

    Raises:
        UserError: If a value is out of range.
    """
    if not 0 <= beta <= 1:
        raise UserError(f"losses.{name}.beta must lie between 0 and 1, got {beta}")
    if temperature <= 0:
        raise UserError(f"losses.{name}.temperature must be positive, got {temperature}")


@dataclass(frozen=True)
class Kd(Term):
    """Divergence from the teacher at each token of the gold answer.

    Attributes:
        weight: Factor in the whole loss.
        beta: 0 for KL(teacher || student), 1 for KL(student || teacher); see `divergence`.
        temperature: See `divergence`.
    """

    weight: float = 1.0
    beta: float = 0.0
    temperature: float = 1.0
    name: ClassVar[str] = "kd"
    needs: ClassVar[frozenset[str]] = frozenset({"gold", "gold.teacher"})

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            UserError: If a value is out of range.
        """
        check_divergence(self.name, self.beta, self.temperature)

    def __call__(self, evidence: Evidence) -> Loss:
        """Summed over tokens."""
        gold = evidence.of("gold")
        if gold.teacher is None:
            raise ValueError("kd needs the teacher's logits of the gold answers")
        total = divergence(gold.logits, gold.teacher, self.beta, self.temperature).sum()
        return Loss(total, torch.tensor(len(gold.targets), device=total.device), per_token=True)
