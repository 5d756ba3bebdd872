"""What a folder of clusters holds, that its parts agree, and that it appears at once or not at all."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kvc.data.clustering.build import build
from kvc.data.clustering.folder import replaced
from kvc.data.clustering.items import Item
from kvc.data.clustering.kmeans import KMeansSettings
from kvc.data.clustering.tfidf import TfidfSvd
from kvc.errors import UserError


def test_every_file_is_there(clusters: Path) -> None:
    assert {path.name for path in clusters.iterdir()} == {
        *("clusters.json", "questions.jsonl", "question_embeddings.npy", "embedder.safetensors", "embedder_words.json"),
        *("data_k3.json", "data_k5.json", "k3", "k5", "projector"),
    }
    assert {path.name for path in (clusters / "k5").iterdir()} == {
        *("cluster_labels.npy", "centroids.npy", "clusters_visualization.png", "clustering_results.json"),
        *("cluster_statistics.json", "clusters"),
    }
    assert len(list((clusters / "k5" / "clusters").iterdir())) == 5
    assert [path.name for path in clusters.parent.iterdir()] == ["clusters"]


def test_files_agree(clusters: Path, items: list[Item]) -> None:
    vectors = np.load(clusters / "question_embeddings.npy", allow_pickle=False)
    for k in (3, 5):
        home = clusters / f"k{k}"
        labels = np.load(home / "cluster_labels.npy", allow_pickle=False)
        centroids = np.load(home / "centroids.npy", allow_pickle=False)
        result = json.loads((home / "clustering_results.json").read_text())
        statistics = json.loads((home / "cluster_statistics.json").read_text())
        assert result["labels"] == labels.tolist()
        assert (result["k"], result["seed"], result["n_init"], result["max_iter"]) == (k, 42, 10, 300)
        assert sum(row["size"] for row in statistics["clusters"]) == 24
        nearest = []
        for number in range(k):
            cluster = json.loads((home / "clusters" / f"cluster_{number}.json").read_text())
            members = [sample["index"] for sample in cluster["samples"]]
            assert sorted(members) == np.flatnonzero(labels == number).tolist() == result["clusters"][str(number)]
            for sample in cluster["samples"]:
                assert Item(*(sample[key] for key in Item._fields)) == items[sample["index"]]
            distances = np.linalg.norm(vectors[members] - centroids[number], axis=1)
            np.testing.assert_allclose([sample["distance"] for sample in cluster["samples"]], distances, atol=1e-5)
            assert (np.diff(distances) > -1e-6).all()
            nearest.append(members[0])
            assert statistics["clusters"][number]["size"] == len(members)
        assert result["nearest"] == nearest
        documents = json.loads((clusters / f"data_k{k}.json").read_text())
        assert documents == [items[number]._asdict() for number in nearest]
        assert set(documents[0]) == {"problem", "reasoning", "solution"}


def test_the_picture_is_a_picture(clusters: Path) -> None:
    with Image.open(clusters / "k3" / "clusters_visualization.png") as picture:
        assert picture.size[0] > 800
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 20


def test_the_projector_shows_every_question(clusters: Path, items: list[Item]) -> None:
    (metadata,) = (clusters / "projector").rglob("metadata.tsv")
    header, *lines = metadata.read_text().splitlines()
    assert header.split("\t") == ["question", "index", "cluster_k3", "cluster_k5"]
    assert len(lines) == 24
    labels = np.load(clusters / "k5" / "cluster_labels.npy", allow_pickle=False)
    assert [line.split("\t")[3] for line in lines] == labels.astype(str).tolist()
    assert "tensors.tsv" in (clusters / "projector" / "projector_config.pbtxt").read_text()


def test_the_same_questions_give_the_same_bytes(clusters: Path, items: list[Item], tmp_path: Path) -> None:
    again = tmp_path / "again"
    build(again, "some/questions.jsonl", items, TfidfSvd(), [3, 5], KMeansSettings())
    names = [
        path.relative_to(clusters) for path in clusters.rglob("*") if path.is_file() and "tfevents" not in path.name
    ]
    assert len(names) > 20
    for name in names:
        assert (again / name).read_bytes() == (clusters / name).read_bytes(), name


class Broken(TfidfSvd):
    """Fails after everything else has been written."""

    def save(self, folder: Path) -> None:
        assert (folder / "k3").is_dir()
        raise UserError("the disk is full")


def test_a_failure_leaves_what_was_there(items: list[Item], tmp_path: Path) -> None:
    target = tmp_path / "out"
    with pytest.raises(UserError, match="the disk is full"):
        build(target, "x", items, Broken(), [3], KMeansSettings())
    assert list(tmp_path.iterdir()) == []
    target.mkdir()
    (target / "old").write_text("old")
    with pytest.raises(UserError, match="the disk is full"):
        build(target, "x", items, Broken(), [3], KMeansSettings())
    assert [path.relative_to(tmp_path) for path in tmp_path.rglob("*")] == [Path("out"), Path("out/old")]


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "half").write_text("half")
    with replaced(tmp_path / "out") as folder:
        assert list(folder.iterdir()) == []
        (folder / "whole").write_text("whole")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("ks", "sentence"),
    [
        ([25], "--k 25: there are only 24 questions"),
        ([3, 3], "--k 3 3: a number is given twice"),
        ([0], "--k 0: give 1"),
    ],
)
def test_impossible_numbers(items: list[Item], tmp_path: Path, ks: list[int], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        build(tmp_path / "out", "x", items, TfidfSvd(), ks, KMeansSettings())
    assert list(tmp_path.iterdir()) == []
