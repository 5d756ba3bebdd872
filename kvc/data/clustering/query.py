"""Which cluster a new question belongs to, and which questions are most like it."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvc.data.clustering.embedder import Embedder, Vectors
from kvc.data.clustering.folder import CENTROIDS, EMBEDDINGS, LABELS, read_array, read_manifest, read_questions
from kvc.data.clustering.items import Item
from kvc.data.clustering.kmeans import squared_distances
from kvc.data.clustering.sentences import SentenceEmbedder
from kvc.data.clustering.tfidf import TfidfSvd
from kvc.errors import UserError

LIMO_FOLDER = "clusters/LIMO"
EMBEDDERS: dict[str, type[TfidfSvd] | type[SentenceEmbedder]] = {
    embedder.kind: embedder for embedder in (TfidfSvd, SentenceEmbedder)
}


@dataclass(frozen=True)
class Neighbour:
    """A question of the set beside the one that was asked.

    Attributes:
        index: Its number in the set, from 0.
        similarity: Cosine of both vectors.
        problem: The question.
        reasoning: How it is solved.
        solution: The final answer.
    """

    index: int
    similarity: float
    problem: str
    reasoning: str
    solution: str

    @property
    def item(self) -> Item:
        """The question alone."""
        return Item(self.problem, self.reasoning, self.solution)


class ClusterQuery:
    """Searches a folder that `python -m kvc cluster` has written.

    Args:
        folder: The folder.
        k_value: Which of its clusterings `find_closest_cluster` uses.
        embedder: For folders made with an embedder of your own; what made the others is known.

    Raises:
        UserError: If the folder holds no such clustering.
    """

    def __init__(self, folder: str | Path, k_value: int = 16, embedder: Embedder | None = None) -> None:
        self.folder, self.k_value = Path(folder), k_value
        self.manifest = read_manifest(self.folder)
        made = self.manifest["k"]
        if k_value not in made:
            raise UserError(f"{self.folder} has no {k_value} clusters, only k = {', '.join(map(str, made))}")
        self._given = embedder

    @cached_property
    def items(self) -> list[Item]:
        """All questions."""
        return read_questions(self.folder, self.manifest["questions"])

    @cached_property
    def vectors(self) -> Vectors:
        """Their vectors, `[N, D]`."""
        return read_array(self.folder / EMBEDDINGS, len(self.items), self.manifest["dimensions"])

    @cached_property
    def labels(self) -> NDArray[np.int64]:
        """Their clusters, `[N]`."""
        return read_array(self.folder / f"k{self.k_value}" / LABELS, len(self.items))

    @cached_property
    def centroids(self) -> Vectors:
        """`[k, D]`."""
        shape = (self.k_value, self.manifest["dimensions"])
        return read_array(self.folder / f"k{self.k_value}" / CENTROIDS, *shape)

    @cached_property
    def embedder(self) -> Embedder:
        """What turned the questions into vectors."""
        if self._given is not None:
            return self._given
        made: dict[str, Any] = self.manifest["embedder"]
        if made["kind"] not in EMBEDDERS:
            raise UserError(f"{self.folder} was made with an embedder of kind {made['kind']}: pass it as embedder=")
        embedder = EMBEDDERS[made["kind"]](**made["settings"])
        embedder.restore(self.folder)
        return embedder

    def find_closest_cluster(self, question: str, n: int | None = None) -> tuple[int, list[Neighbour]]:
        """The cluster of a question, by the rule of k-means: the smallest distance to a centroid.

        So a question of the set finds the cluster that holds it, which the cosine to centroids would not promise.

        Args:
            question: Any question.
            n: At most so many samples; None gives the whole cluster.

        Returns:
            The cluster, and its questions, most similar first.

        Raises:
            UserError: If the question is empty or shares nothing with the set.
        """
        vector = self._embed(question)
        cluster = int(squared_distances(vector[None], self.centroids).argmin())
        return cluster, self._nearest(vector, np.flatnonzero(self.labels == cluster), n)

    def closest_clusters(self, question: str, n: int = 3) -> list[tuple[int, float]]:
        """The `n` nearest clusters and the distances to their centroids, nearest first.

        Raises:
            UserError: If the question is empty or shares nothing with the set.
        """
        distances = np.sqrt(squared_distances(self._embed(question)[None], self.centroids)[0])
        return [(int(i), float(distances[i])) for i in np.argsort(distances, kind="stable")[:n]]

    def most_similar(self, question: str, n: int = 20) -> list[Neighbour]:
        """The `n` most similar questions of the whole set by exact cosine, most similar first.

        Raises:
            UserError: If the question is empty or shares nothing with the set.
        """
        return self._nearest(self._embed(question), np.arange(len(self.items)), n)

    def _embed(self, question: str) -> Vectors:
        """`[D]`."""
        if not question.strip():
            raise UserError("the question is empty")
        vector: Vectors = self.embedder.embed([question])[0]
        if vector.shape != self.vectors.shape[1:]:
            raise UserError(
                f"{self.folder} was made with vectors of {self.vectors.shape[1]} dimensions, not {len(vector)}"
            )
        if not vector.any():
            raise UserError("the question shares no word with the questions of the set, so nothing is similar to it")
        return vector

    def _nearest(self, vector: Vectors, among: NDArray[np.intp], n: int | None) -> list[Neighbour]:
        similarities = self.vectors[among] @ vector
        order = np.argsort(-similarities, kind="stable")[:n]
        return [Neighbour(int(among[i]), float(similarities[i]), *self.items[among[i]]) for i in order]


class LIMOClusterQuery(ClusterQuery):
    """The clusters of LIMO, as `python -m kvc cluster hub:GAIR/LIMO` writes them.

    Args:
        k_value: Which clustering.
        folder: Where they lie.
        embedder: See `ClusterQuery`.
    """

    def __init__(self, k_value: int = 16, folder: str | Path = LIMO_FOLDER, embedder: Embedder | None = None) -> None:
        super().__init__(folder, k_value, embedder)
