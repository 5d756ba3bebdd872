"""The interface of whatever turns questions into vectors."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

Vectors = NDArray[np.float32]
"""`[N, D]`; every row has length 1, so that a dot product is a cosine, or is zero where nothing could be said."""

# A row shorter than this is rounding: the question shares nothing with what the embedder knows.
NOTHING = 1e-6


class Embedder(ABC):
    """Turns questions into vectors; the vector of a question does not depend on what else is embedded with it.

    A subclass writes all five; `save` and `restore` do nothing where nothing is learned.
    """

    kind: ClassVar[str]
    """Name under which a folder of clusters remembers it."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Constructor arguments as JSON: with the same ones, the same questions give the same vectors."""

    @abstractmethod
    def fit(self, questions: Sequence[str]) -> Vectors:
        """Learn from all questions, where there is anything to learn, and embed them.

        Raises:
            UserError: If the questions or the model cannot be used.
        """

    @abstractmethod
    def embed(self, questions: Sequence[str]) -> Vectors:
        """Embed questions with what `fit` or `restore` left.

        Raises:
            UserError: If the model cannot be used.
        """

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write what `fit` has learned into a folder."""

    @abstractmethod
    def restore(self, folder: Path) -> None:
        """Read it back.

        Raises:
            UserError: If the folder is damaged.
        """


def unit_rows(rows: NDArray[Any]) -> Vectors:
    """`rows` `[N, D]` scaled to length 1, and to zero where they are too short to have a direction."""
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.where(lengths > NOTHING, rows / np.maximum(lengths, NOTHING), 0).astype(np.float32)
