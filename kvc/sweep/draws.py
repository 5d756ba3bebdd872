"""Random search: some cells of a product, the same for the same seed."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Draw:
    """How many cells are drawn.

    Attributes:
        count: Number of cells.
        seed: Of the draw.
    """

    count: int
    seed: int

    def of(self, items: Sequence[T]) -> list[T]:
        """Draw without replacement; a larger count begins with the cells of a smaller one.

        Raises:
            ValueError: If there are fewer items than are to be drawn.
        """
        if self.count > len(items):
            raise ValueError(f"{self.count} cells are to be drawn, but there are only {len(items)}")
        return random.Random(self.seed).sample(items, len(items))[: self.count]
