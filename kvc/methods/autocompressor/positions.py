"""Positions of text, soft prompts and summary slots, by how a model family knows positions.

Shapes: B batch, T columns.
"""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from kvc.core.backbone import decoder
from kvc.errors import UserError

OFFSET = 2
"""Rows of OPT's table before that of position 0; the row before it, of position -1, means no position."""


class Positions(ABC):
    """Which position each column gets."""

    limit: int | None = None
    """Text tokens of a segment that have a position; None for no limit."""

    @abstractmethod
    def ids(self, valid: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """Positions of columns.

        Args:
            valid: bool `[B, T]`, False for padding.
            text: bool `[T]`, False for soft prompts and summary slots.

        Returns:
            int64 `[B, T]`.
        """


class Contiguous(Positions):
    """Every column takes the next position; padding takes none (rotary models)."""

    def ids(self, valid: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """See `Positions`."""
        return (valid.long().cumsum(-1) - 1).clamp(min=0)


class TextOnly(Positions):
    """Text counts from 0 in every segment; what is no text has no position (OPT).

    Args:
        limit: Text tokens of a segment that have a position.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit

    def ids(self, valid: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """See `Positions`; -1 for columns without a position."""
        counted = valid & text
        return (counted.long().cumsum(-1) - 1).masked_fill(~counted, -1)


def positions_of(model: PreTrainedModel) -> Positions:
    """The rule of a model's family. The row of OPT's table that means no position becomes zero and stays so.

    Raises:
        UserError: If the model has a table of positions, but not that of OPT.
    """
    stack = decoder(model)
    table = getattr(stack, "embed_positions", None)
    if model.config.model_type == "opt":
        assert isinstance(table, nn.Embedding)
        # As for padding: no gradient reaches the row.
        table.padding_idx = OFFSET - 1
        with torch.no_grad():
            table.weight[OFFSET - 1].zero_()
        return TextOnly(table.num_embeddings - OFFSET)
    if table is not None or hasattr(stack, "wpe"):
        raise UserError(f"{type(model).__name__} learns its positions in a table: only OPT and rotary models are known")
    return Contiguous()


@torch.no_grad()
def extend_table(model: PreTrainedModel, length: int) -> None:
    """Give OPT's table more positions by repeating those it has; a table that is long enough stays.

    Args:
        model: An OPT model.
        length: Positions that it shall have.

    Raises:
        UserError: If the model has no such table.
    """
    if model.config.model_type != "opt":
        raise UserError(f"max_position_embeddings: {type(model).__name__} has no table of positions to extend")
    table: Any = decoder(model).embed_positions
    have = table.num_embeddings - OFFSET
    if length <= have:
        return
    rows = table.weight[OFFSET:].repeat(-(-length // have), 1)[:length]
    weight = torch.cat([table.weight[:OFFSET], rows])
    table.weight = nn.Parameter(weight, requires_grad=table.weight.requires_grad)
    table.num_embeddings = len(weight)
    model.config.max_position_embeddings = length
