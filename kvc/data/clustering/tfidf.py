"""Embeddings that need no model and no network: words weighted by rarity, reduced by a singular value decomposition."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from kvc.core.files import atomic, write_json
from kvc.data.clustering.embedder import Embedder, Vectors, unit_rows
from kvc.errors import UserError

WORDS, WEIGHTS = "embedder_words.json", "embedder.safetensors"


class TfidfSvd(Embedder):
    """TF-IDF over words, then the leading singular directions (latent semantic analysis, Deerwester et al. 1990).

    Args:
        dimensions: Length of a vector; less where there are fewer questions or words.
        seed: Of the randomised decomposition.
    """

    kind: ClassVar[str] = "tfidf"

    def __init__(self, dimensions: int = 128, seed: int = 42) -> None:
        if dimensions < 1:
            raise UserError(f"--dimensions {dimensions}: give 1 or more")
        self.dimensions, self.seed = dimensions, seed
        self._vectorizer: Any = None
        self._axes_VD: NDArray[np.float32] = np.zeros((0, 0), np.float32)

    def settings(self) -> dict[str, Any]:
        """Constructor arguments."""
        return {"dimensions": self.dimensions, "seed": self.seed}

    def fit(self, questions: Sequence[str]) -> Vectors:
        """Learn words, weights and directions from all questions, and embed them.

        Raises:
            UserError: If no question holds a word of two letters or more.
        """
        from sklearn.decomposition import TruncatedSVD
        from sklearn.feature_extraction.text import TfidfVectorizer
        from threadpoolctl import threadpool_limits

        self._vectorizer = TfidfVectorizer(sublinear_tf=True)
        try:
            counts = self._vectorizer.fit_transform(questions)
        except ValueError:
            raise UserError("no question holds a word of two letters or more, so TF-IDF has nothing to count") from None
        # With several threads the order of summation, and so the last bits, would depend on the machine.
        with threadpool_limits(1), np.errstate(invalid="ignore"):
            svd = TruncatedSVD(min(self.dimensions, *counts.shape), random_state=self.seed).fit(counts)
        self._axes_VD = svd.components_.T.astype(np.float32)
        return self.embed(questions)

    def embed(self, questions: Sequence[str]) -> Vectors:
        """Embed questions; one without a known word has the zero vector."""
        assert self._vectorizer is not None, "fit or restore comes first"
        return unit_rows(self._vectorizer.transform(questions) @ self._axes_VD)

    def save(self, folder: Path) -> None:
        """Write words (JSON) and numbers (safetensors)."""
        from safetensors.numpy import save_file

        write_json(folder / WORDS, self._vectorizer.get_feature_names_out().tolist())
        arrays = {"idf": self._vectorizer.idf_, "axes": self._axes_VD}
        with atomic(folder / WEIGHTS) as temporary:
            save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, temporary)

    def restore(self, folder: Path) -> None:
        """Read them back.

        Raises:
            UserError: If one is missing or damaged, or they do not belong together.
        """
        import json

        from safetensors import SafetensorError
        from safetensors.numpy import load_file
        from sklearn.feature_extraction.text import TfidfVectorizer

        try:
            words = json.loads((folder / WORDS).read_text(encoding="utf-8"))
            arrays = load_file(folder / WEIGHTS)
            if not len(words) == len(arrays["idf"]) == len(arrays["axes"]):
                raise ValueError("sizes differ")
            self._vectorizer = TfidfVectorizer(sublinear_tf=True, vocabulary=words)
            self._vectorizer.idf_ = arrays["idf"]
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise UserError(f"{folder}: {WORDS} or {WEIGHTS} is missing or damaged: {error}") from None
        self._axes_VD = arrays["axes"]
