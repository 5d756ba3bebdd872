"""Ranking metrics on grouped samples, with bootstrap intervals over the groups."""

import numpy as np


class Ranking:
    """Scores and labels of many positions that belong to few units (traces), sorted once.

    A bootstrap resamples units; with the positions sorted once, each resample costs one pass of cumulative sums instead
    of a sort. With unit weights of one the values are those of scikit-learn.

    Args:
        scores: `[N]`, higher means positive.
        labels: `[N]`, 0 or 1.
        units: `[N]`, number of the unit of each position, 0..U-1.
    """

    def __init__(self, scores: np.ndarray, labels: np.ndarray, units: np.ndarray) -> None:
        order = np.argsort(-scores, kind="stable")
        self._labels = labels[order].astype(float)
        self._units = units[order]
        ranked = scores[order]
        # Equal scores cannot be told apart by any threshold: they enter together.
        self._last = np.flatnonzero(np.append(np.diff(ranked) != 0, True))
        self.thresholds = ranked[self._last]

    def counts(self, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """True and false positives at each distinct threshold, from the highest.

        Args:
            weights: `[U]`, how often each unit counts.
        """
        weight = weights[self._units]
        hits = np.cumsum(weight * self._labels)[self._last]
        return hits, np.cumsum(weight)[self._last] - hits

    def average_precision(self, weights: np.ndarray) -> float:
        """Area under the precision-recall steps: sum of precision times gain in recall."""
        hits, misses = self.counts(weights)
        if hits[-1] == 0:
            return float("nan")
        # A threshold that only resampled-away positions reach has no counts yet and gains nothing.
        precision = hits / np.maximum(hits + misses, 1)
        return float(np.sum(np.diff(hits, prepend=0.0) * precision) / hits[-1])

    def roc_auc(self, weights: np.ndarray) -> float:
        """Probability that a positive outranks a negative, ties counting half."""
        hits, misses = self.counts(weights)
        if hits[-1] == 0 or misses[-1] == 0:
            return float("nan")
        gains = np.diff(misses, prepend=0.0)
        return float(np.sum(gains * (hits - 0.5 * np.diff(hits, prepend=0.0))) / (hits[-1] * misses[-1]))

    def best_f1(self, weights: np.ndarray) -> tuple[float, float]:
        """The largest F1 and the threshold that gives it (predict positive where score >= threshold)."""
        hits, misses = self.counts(weights)
        f1 = 2 * hits / np.maximum(hits + misses + hits[-1], 1e-12)
        best = int(np.argmax(f1))
        return float(f1[best]), float(self.thresholds[best])
