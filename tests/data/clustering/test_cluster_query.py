"""The cluster of a question, and its nearest neighbours, against brute force."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvc.data.clustering import ClusterQuery, LIMOClusterQuery
from kvc.data.clustering.build import build
from kvc.data.clustering.embedder import Embedder, Vectors, unit_rows
from kvc.data.clustering.items import Item
from kvc.data.clustering.kmeans import KMeansSettings
from kvc.errors import UserError

NEW = "How many eggs do the chickens of this farmer lay?"


@pytest.mark.parametrize("k", [3, 5])
def test_every_question_finds_its_own_cluster(clusters: Path, items: list[Item], k: int) -> None:
    query = ClusterQuery(clusters, k)
    for number, item in enumerate(items):
        cluster, samples = query.find_closest_cluster(item.problem)
        assert cluster == query.labels[number]
        assert {sample.index for sample in samples} == set(np.flatnonzero(query.labels == cluster))
        assert samples[0].similarity == pytest.approx(1)
        assert number in [sample.index for sample in samples if sample.similarity > 1 - 1e-6]


def test_a_new_question_finds_its_topic(clusters: Path) -> None:
    cluster, samples = ClusterQuery(clusters, 3).find_closest_cluster(NEW)
    assert all("eggs" in sample.problem for sample in samples)
    assert len(samples) == 8
    assert [sample.similarity for sample in samples] == sorted((s.similarity for s in samples), reverse=True)
    assert ClusterQuery(clusters, 3).find_closest_cluster(NEW, n=2) == (cluster, samples[:2])
    assert ClusterQuery(clusters, 3).closest_clusters(NEW, 2)[0][0] == cluster


def test_neighbours_are_exact(clusters: Path, items: list[Item]) -> None:
    query = ClusterQuery(clusters, 5)
    vector = query.embedder.embed([NEW])[0].astype(float)
    cosines = query.vectors.astype(float) @ vector
    found = query.most_similar(NEW, 7)
    # Of the questions of a topic several are equally near, up to rounding.
    np.testing.assert_allclose(cosines[[neighbour.index for neighbour in found]], np.sort(cosines)[::-1][:7], atol=1e-6)
    np.testing.assert_allclose([neighbour.similarity for neighbour in found], np.sort(cosines)[::-1][:7], atol=1e-6)
    assert found[0].item == items[found[0].index]
    assert len(query.most_similar(NEW, 100)) == 24


@pytest.mark.parametrize(("question", "sentence"), [(" ", "is empty"), ("zebra quark", "shares no word")])
def test_questions_without_an_answer(clusters: Path, question: str, sentence: str) -> None:
    for search in (ClusterQuery(clusters, 3).find_closest_cluster, ClusterQuery(clusters, 3).most_similar):
        with pytest.raises(UserError, match=sentence):
            search(question)


def test_the_call_of_the_brief(clusters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="clusters/LIMO holds no clusters: python -m kvc cluster"):
        LIMOClusterQuery(k_value=16)
    shutil.copytree(clusters, "clusters/LIMO")
    cluster_id, samples = LIMOClusterQuery(k_value=3).find_closest_cluster(NEW)
    assert 0 <= cluster_id < 3
    assert len(samples) == 8
    with pytest.raises(UserError, match="has no 16 clusters, only k = 3, 5"):
        LIMOClusterQuery(k_value=16)


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("clusters.json", b"{", "clusters.json is damaged"),
        ("clusters.json", b"[]", "clusters.json is damaged"),
        ("questions.jsonl", b"", "holds 0 questions, not 24"),
        ("questions.jsonl", b"{}\n", "questions.jsonl is missing or damaged"),
        ("question_embeddings.npy", b"", "question_embeddings.npy is missing or damaged"),
        ("k3/cluster_labels.npy", None, "cluster_labels.npy is missing or damaged"),
        ("embedder_words.json", b"[]", "embedder_words.json or embedder.safetensors is missing or damaged"),
    ],
)
def test_damage_is_named(clusters: Path, tmp_path: Path, name: str, content: bytes | None, sentence: str) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(clusters, copy)
    (copy / name).unlink() if content is None else (copy / name).write_bytes(content)
    with pytest.raises(UserError, match=sentence):
        ClusterQuery(copy, 3).find_closest_cluster(NEW)


def test_pickles_are_refused(clusters: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(clusters, copy)
    np.save(copy / "k3" / "cluster_labels.npy", np.array([{}] * 24, dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match=r"cluster_labels\.npy is missing or damaged"):
        ClusterQuery(copy, 3).find_closest_cluster(NEW)


class Lengths(Embedder):
    """An embedder of one's own: how many characters and words."""

    kind = "lengths"

    def settings(self) -> dict[str, Any]:
        return {}

    def fit(self, questions: Sequence[str]) -> Vectors:
        return self.embed(questions)

    def embed(self, questions: Sequence[str]) -> Vectors:
        return unit_rows(np.array([[len(text), 5 * len(text.split())] for text in questions], float))

    def save(self, folder: Path) -> None: ...

    def restore(self, folder: Path) -> None: ...


def test_an_embedder_of_ones_own(items: list[Item], tmp_path: Path) -> None:
    build(tmp_path / "out", "x", items, Lengths(), [3], KMeansSettings())
    assert json.loads((tmp_path / "out" / "clusters.json").read_text())["embedder"]["kind"] == "lengths"
    with pytest.raises(UserError, match="embedder of kind lengths: pass it as embedder="):
        ClusterQuery(tmp_path / "out", 3).most_similar(NEW)
    assert len(ClusterQuery(tmp_path / "out", 3, Lengths()).most_similar(NEW, 4)) == 4
