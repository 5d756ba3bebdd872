"""Losses that keep the slots of different texts apart.

Shapes: B batch, M slots, D width, W ranks.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.distributed
from torch import nn
from torch.nn import functional as F

from kvc.errors import UserError
from kvc.methods.squad.losses.evidence import Evidence
from kvc.methods.squad.losses.mix import Loss, Term


@dataclass(frozen=True)
class OffdiagMargin(Term):
    """ReLU(mean of cos(z_i, z_j) over pairs i != j, minus a margin), z_i the first slot of row i.

    Only the first slot feels it, a mean over pairs hides single collapsed ones, and below the margin there is no
    gradient. A batch of one row has no pairs and gives 0.

    Attributes:
        weight: Factor in the whole loss.
        margin: Similarity that costs nothing.
    """

    weight: float = 0.1
    margin: float = 0.3
    name: ClassVar[str] = "contrastive"
    needs: ClassVar[frozenset[str]] = frozenset({"slots"})

    def __call__(self, evidence: Evidence) -> Loss:
        """One value for the batch, counted for each row."""
        first = F.normalize(evidence.of("slots")[:, 0].float(), dim=-1)
        rows = len(first)
        if rows < 2:
            return Loss(first.sum() * 0, torch.tensor(rows, device=first.device), per_token=False)
        similar = first @ first.T
        mean = (similar.sum() - similar.diagonal().sum()) / (rows * (rows - 1))
        return Loss((mean - self.margin).relu() * rows, torch.tensor(rows, device=first.device), per_token=False)


class InfoNce(Term):
    """The slots of a text should resemble that text's reference more than those of others (van den Oord et al. 2018).

    z_i is a projection of the mean of row i's slots, its positive the reference of the same row without gradient, and
    the negatives the references of all rows, of all ranks, that are about another text.

    Args:
        weight: Factor in the whole loss.
        temperature: Of the similarities.
    """

    name: ClassVar[str] = "contrastive"
    needs: ClassVar[frozenset[str]] = frozenset({"slots", "slot_mask", "reference", "group"})

    def __init__(self, weight: float = 0.1, temperature: float = 0.1) -> None:
        if temperature <= 0:
            raise UserError(f"losses.contrastive.temperature must be positive, got {temperature}")
        self.weight, self.temperature = weight, temperature
        self.head: nn.Module = nn.Identity()

    def build(self, width: int) -> nn.Module:
        """The projection, D to D."""
        self.head = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))
        return self.head

    def __call__(self, evidence: Evidence) -> Loss:
        """Summed over rows."""
        ours = self.head(slot_means(evidence.of("slots"), evidence.of("slot_mask")).float())
        values = infonce(ours, evidence.of("reference"), evidence.of("group"), self.temperature)
        return Loss(values.sum(), torch.tensor(len(values), device=values.device), per_token=False)


def infonce(
    ours: torch.Tensor, references: torch.Tensor, group: torch.Tensor, temperature: float = 0.1
) -> torch.Tensor:
    """The loss of each row, fp32 `[B]`; every rank must have B rows.

    Args:
        ours: `[B, D]`.
        references: `[B, D]`, without gradient.
        group: Number of each row's text, int64 `[B]`; other rows of the same text are no negatives.
        temperature: Of the similarities.
    """
    theirs, theirs_group = _all_ranks(references.detach().float()), _all_ranks(group)
    scores = F.normalize(ours.float(), dim=-1) @ F.normalize(theirs, dim=-1).T / temperature
    target = torch.arange(len(ours), device=ours.device) + _rank() * len(ours)
    same = group[:, None] == theirs_group
    same[torch.arange(len(ours), device=ours.device), target] = False
    return F.cross_entropy(scores.masked_fill(same, -torch.inf), target, reduction="none")


def slot_means(slots: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean of each row's slots, `[B, D]`, of slots `[B, M, D]` and their mask `[B, M]`; 0 for a row without any."""
    return slots.masked_fill(~mask[..., None], 0.0).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _rank() -> int:
    return torch.distributed.get_rank() if _distributed() else 0


def _all_ranks(values: torch.Tensor) -> torch.Tensor:
    """The rows of all ranks, `[W * B, ...]`, rank after rank; without gradient."""
    if not _distributed():
        return values
    found = [torch.empty_like(values) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(found, values.contiguous())
    return torch.cat(found)
