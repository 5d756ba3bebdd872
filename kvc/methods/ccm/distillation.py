"""Distillation: the compressed model learns what the base model says with everything in sight."""

from dataclasses import dataclass

import torch
from torch.nn import functional as F


@dataclass
class Distillation:
    """How much of the loss is the divergence from the base model with the full context.

    loss = (1 - weight) CE + weight temperature^2 KL(teacher || student), for each predicted token (Hinton et al. 2015).

    Attributes:
        weight: Share of the divergence, above 0 and at most 1.
        temperature: Both distributions are softened by it.
    """

    weight: float = 0.5
    temperature: float = 1.0

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            ValueError: If a value is out of range.
        """
        if not 0 < self.weight <= 1:
            raise ValueError(f"distillation.weight must be above 0 and at most 1, got {self.weight}")
        if self.temperature <= 0:
            raise ValueError(f"distillation.temperature must be positive, got {self.temperature}")

    def mixed(self, cross_entropy: torch.Tensor, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        """The loss, summed over tokens.

        Args:
            cross_entropy: Summed over tokens, scalar.
            student: fp32 logits `[N, V]` of N tokens.
            teacher: fp32 logits `[N, V]`.
        """
        heat = self.temperature
        ours, theirs = F.log_softmax(student / heat, -1), F.log_softmax(teacher / heat, -1)
        divergence = F.kl_div(ours, theirs, reduction="sum", log_target=True)
        return (1 - self.weight) * cross_entropy + self.weight * heat**2 * divergence
