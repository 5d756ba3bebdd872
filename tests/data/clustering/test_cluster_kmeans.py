"""K-means as scikit-learn runs it, its refusals, and words that tell clusters apart."""

import numpy as np
import pytest
from sklearn.cluster import KMeans
from word_problems import NAMES

from kvc.data.clustering.embedder import unit_rows
from kvc.data.clustering.items import Item
from kvc.data.clustering.kmeans import KMeansSettings, find_clusters, squared_distances
from kvc.data.clustering.picture import apart, project
from kvc.data.clustering.terms import typical_terms
from kvc.data.clustering.tfidf import TfidfSvd
from kvc.errors import UserError

RNG = np.random.default_rng(0)
VECTORS = unit_rows(RNG.normal(size=(60, 5)))


def test_it_is_the_documented_k_means() -> None:
    found = find_clusters(VECTORS, 4, KMeansSettings())
    reference = KMeans(4, random_state=42, n_init=10, max_iter=300).fit(VECTORS)
    assert np.array_equal(found.labels, reference.labels_)
    assert np.array_equal(find_clusters(VECTORS, 4, KMeansSettings()).centroids, found.centroids)
    means = np.stack([VECTORS[found.labels == number].mean(0) for number in range(4)])
    np.testing.assert_allclose(found.centroids, means, atol=1e-5)
    assert found.sizes.tolist() == np.bincount(reference.labels_).tolist()


def test_the_nearest_centroid_is_that_of_the_own_cluster() -> None:
    found = find_clusters(VECTORS, 7, KMeansSettings())
    assert np.array_equal(squared_distances(VECTORS, found.centroids).argmin(1), found.labels)
    brute = ((VECTORS[:, None].astype(float) - found.centroids[None]) ** 2).sum(-1)
    np.testing.assert_allclose(squared_distances(VECTORS, found.centroids), brute, atol=1e-12)


def test_topics_are_found(items: list[Item]) -> None:
    questions = [item.problem for item in items]
    found = find_clusters(TfidfSvd().fit(questions), 3, KMeansSettings())
    by_topic = found.labels.reshape(-1, 3)
    assert (by_topic == by_topic[0]).all()
    assert len(set(by_topic[0])) == 3
    terms = typical_terms(questions, found.labels, 3)
    for name, number in zip(NAMES, by_topic[0]):
        assert {"eggs": "eggs", "cars": "miles", "books": "pages"}[name] in terms[number][:3]


def test_too_few_different_questions() -> None:
    with pytest.raises(UserError, match="--k 61: there are only 60 questions; give a smaller --k"):
        find_clusters(VECTORS, 61, KMeansSettings())
    with pytest.raises(UserError, match="--k 3: there are only 6 questions, 2 of them different"):
        find_clusters(np.repeat(VECTORS[:2], 3, axis=0), 3, KMeansSettings())


def test_the_silhouette_is_left_out_where_it_is_not_defined() -> None:
    assert find_clusters(VECTORS[:3], 3, KMeansSettings()).silhouette is None
    assert find_clusters(VECTORS, 1, KMeansSettings()).silhouette is None
    assert find_clusters(VECTORS, 3, KMeansSettings()).silhouette is not None


def test_questions_without_letters_have_no_terms() -> None:
    assert typical_terms(["1 + 2", "3"], np.array([0, 1]), 2) == [[], []]


def test_projection_of_what_has_fewer_than_two_dimensions() -> None:
    points, centres, shares = project(VECTORS[:, :1], VECTORS[:2, :1])
    assert (points.shape, centres.shape, shares.shape) == ((60, 2), (2, 2), (2,))
    assert not points[:, 1].any()
    assert project(VECTORS[:1], VECTORS[:1])[0].shape == (1, 2)


def test_labels_part() -> None:
    places = apart(np.zeros((12, 2)), gap=0.1)
    distances = np.linalg.norm(places[:, None] - places[None], axis=2) + np.eye(12)
    assert distances.min() > 0.09
    far = np.array([[0.0, 0.0], [1.0, 1.0]])
    np.testing.assert_allclose(apart(far), far, atol=1e-3)
