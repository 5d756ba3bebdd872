"""What a cluster is about, in words."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

WORD = r"(?u)\b[^\W\d_]{2,}\b"


def typical_terms(questions: Sequence[str], labels: NDArray[np.int64], k: int, n: int = 8) -> list[list[str]]:
    """The words that set each cluster apart: largest mean TF-IDF above that of all questions.

    Args:
        questions: All of them.
        labels: Cluster of each, `[N]`.
        k: Number of clusters.
        n: Words a cluster.

    Returns:
        A list for each cluster, most typical first; empty where questions hold no words.
    """
    from scipy.sparse import csr_matrix
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer(sublinear_tf=True, token_pattern=WORD)
    try:
        weights = vectorizer.fit_transform(questions)
    except ValueError:
        return [[] for _ in range(k)]
    shares = 1 / np.maximum(np.bincount(labels, minlength=k), 1)[labels]
    means_KV = csr_matrix((shares, (labels, np.arange(len(labels)))), shape=(k, len(labels))) @ weights
    above_KV = means_KV.toarray() - np.asarray(weights.mean(0))
    words = vectorizer.get_feature_names_out()
    order = np.argsort(-above_KV, axis=1, kind="stable")[:, :n]
    return [[str(words[j]) for j in row if above_KV[i, j] > 0] for i, row in enumerate(order)]
