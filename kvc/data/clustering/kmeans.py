"""Clusters of vectors, and what lies nearest to what."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvc.data.clustering.embedder import Vectors
from kvc.errors import UserError

SILHOUETTE_SAMPLE = 2000
"""Questions that the silhouette is estimated on: it compares all pairs."""


@dataclass(frozen=True)
class Clusters:
    """One clustering of N vectors.

    Attributes:
        labels: Cluster of each, `[N]`.
        centroids: Mean of each cluster, `[k, D]`.
        inertia: Sum of squared distances to the own centroid.
        iterations: Of the best of the restarts.
        silhouette: Mean silhouette by cosine, in [-1, 1]; None where it is not defined.
    """

    labels: NDArray[np.int64]
    centroids: Vectors
    inertia: float
    iterations: int
    silhouette: float | None

    @property
    def k(self) -> int:
        """Number of clusters."""
        return len(self.centroids)

    @property
    def sizes(self) -> NDArray[np.int64]:
        """Vectors in each cluster, `[k]`."""
        return np.bincount(self.labels, minlength=self.k)


@dataclass(frozen=True)
class KMeansSettings:
    """How k-means runs.

    Attributes:
        seed: Of the initial centroids.
        n_init: Restarts, of which the best counts.
        max_iter: Largest number of iterations of each.
    """

    seed: int = 42
    n_init: int = 10
    max_iter: int = 300


def find_clusters(vectors: Vectors, k: int, settings: KMeansSettings) -> Clusters:
    """Cluster by k-means.

    Args:
        vectors: `[N, D]`.
        k: Number of clusters.
        settings: How.

    Raises:
        UserError: If there are fewer different vectors than clusters.
    """
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits

    different = len(np.unique(vectors, axis=0))
    if different < k:
        alike = "" if different == len(vectors) else f", {different} of them different"
        raise UserError(f"--k {k}: there are only {len(vectors)} questions{alike}; give a smaller --k")
    # With several threads the order of summation, and so the last bits, would depend on the machine.
    with threadpool_limits(1):
        found: Any = KMeans(k, random_state=settings.seed, n_init=settings.n_init, max_iter=settings.max_iter)
        found.fit(vectors)
        labels = found.labels_.astype(np.int64)
        return Clusters(
            labels,
            found.cluster_centers_.astype(np.float32),
            float(found.inertia_),
            int(found.n_iter_),
            _silhouette(vectors, labels, settings.seed),
        )


def squared_distances(vectors: Vectors, centroids: Vectors) -> NDArray[np.float64]:
    """Squared Euclidean distances `[N, k]`, the measure by which k-means assigns."""
    left, right = vectors.astype(np.float64), centroids.astype(np.float64)
    squares = (left**2).sum(1)[:, None] + (right**2).sum(1)[None, :] - 2 * left @ right.T
    return np.maximum(squares, 0)


def _silhouette(vectors: Vectors, labels: NDArray[np.int64], seed: int) -> float | None:
    from sklearn.metrics import silhouette_samples

    size = min(SILHOUETTE_SAMPLE, len(vectors))
    chosen = np.random.default_rng(seed).choice(len(vectors), size, replace=False)
    if not 2 <= len(np.unique(labels[chosen])) < size:
        return None
    return float(silhouette_samples(vectors[chosen], labels[chosen], metric="cosine").mean())
