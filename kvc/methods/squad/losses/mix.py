"""A weighted sum of terms."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import nn

from kvc.errors import UserError
from kvc.methods.squad.losses.evidence import Evidence


class Loss(NamedTuple):
    """One term.

    Attributes:
        total: Sum over them, scalar.
        units: Number of units, tokens or rows, scalar.
        per_token: Whether the units are tokens; else the term counts as a mean over rows.
    """

    total: torch.Tensor
    units: torch.Tensor
    per_token: bool

    @property
    def mean(self) -> torch.Tensor:
        """Loss of a unit, scalar; 0 without units."""
        return self.total / self.units.clamp(min=1)


class Term(ABC):
    """A part of the loss.

    Attributes:
        weight: Its factor.
        name: Under which it is logged; terms of one name exclude each other.
        needs: What it looks at: fields of `Evidence`, and `gold.teacher` and `own.teacher` for the teacher's logits.
    """

    weight: float
    name: ClassVar[str]
    needs: ClassVar[frozenset[str]]

    @abstractmethod
    def __call__(self, evidence: Evidence) -> Loss:
        """Its value."""

    def build(self, width: int) -> nn.Module | None:
        """Make the weights of its own that are trained along, for slots of this width; None if it has none."""
        return None


class Mixed(NamedTuple):
    """A whole loss.

    Attributes:
        loss_sum: The loss times `num_tokens`, scalar.
        num_tokens: Answer tokens, scalar.
        raw: Each term by name, a mean over its units, without its weight and without gradient.
    """

    loss_sum: torch.Tensor
    num_tokens: torch.Tensor
    raw: dict[str, torch.Tensor]


class Mix(nn.Module):
    """sum_k w_k L_k.

    Terms over tokens are summed, so that rows weigh by their tokens on any number of ranks. Other terms are means over
    rows and enter times the number of tokens.

    Args:
        terms: Different terms with positive weights.
        width: Of the slots, for terms with weights of their own.

    Raises:
        UserError: If there is none, one twice, or a weight that is not positive.
    """

    def __init__(self, terms: Sequence[Term], width: int) -> None:
        super().__init__()
        names = [term.name for term in terms]
        if not terms:
            raise UserError("losses: give at least one term")
        if repeated := [name for name in names if names.count(name) > 1]:
            raise UserError(f"losses: {repeated[0]} is given twice")
        for term in terms:
            if term.weight <= 0:
                raise UserError(
                    f"losses: the weight of {term.name} must be positive, got {term.weight}; or leave it out"
                )
        self.terms = list(terms)
        self.heads = nn.ModuleDict({term.name: head for term in terms if (head := term.build(width)) is not None})

    @property
    def needs(self) -> frozenset[str]:
        """What any term looks at: a step need not work out more."""
        return frozenset[str]().union(*(term.needs for term in self.terms))

    def forward(self, evidence: Evidence, num_tokens: torch.Tensor) -> Mixed:
        """Add the terms up.

        Args:
            evidence: Of one batch.
            num_tokens: Gold answer tokens of the batch, scalar.
        """
        raw: dict[str, torch.Tensor] = {}
        parts = []
        for term in self.terms:
            loss = term(evidence)
            raw[term.name] = loss.mean.detach()
            parts.append(term.weight * (loss.total if loss.per_token else loss.mean * num_tokens))
        return Mixed(torch.stack(parts).sum(), num_tokens, raw)
