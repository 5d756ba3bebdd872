"""Cross-entropy of the gold answer."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn import functional as F

from kvc.methods.squad.losses.evidence import Evidence
from kvc.methods.squad.losses.mix import Loss, Term


@dataclass(frozen=True)
class TeacherForcing(Term):
    """- log p(a_t | prompt, a_<t), over all answer tokens with the end token.

    Attributes:
        weight: Factor in the whole loss.
    """

    weight: float = 1.0
    name: ClassVar[str] = "teacher_forcing"
    needs: ClassVar[frozenset[str]] = frozenset({"gold"})

    def __call__(self, evidence: Evidence) -> Loss:
        """Summed over tokens."""
        gold = evidence.of("gold")
        total = F.cross_entropy(gold.logits.float(), gold.targets, reduction="sum")
        return Loss(total, torch.tensor(len(gold.targets), device=total.device), per_token=True)
