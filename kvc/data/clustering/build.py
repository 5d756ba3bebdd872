"""From questions to a folder of clusters."""

from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from kvc.core.files import digest, write_json
from kvc.data.clustering.embedder import Embedder, Vectors
from kvc.data.clustering.folder import (
    CENTROIDS,
    EMBEDDINGS,
    LABELS,
    MANIFEST,
    SCHEMA,
    replaced,
    write_array,
    write_documents,
    write_questions,
)
from kvc.data.clustering.items import Item
from kvc.data.clustering.kmeans import Clusters, KMeansSettings, find_clusters, squared_distances
from kvc.data.clustering.picture import draw_clusters, write_png
from kvc.data.clustering.projector import write_projector
from kvc.data.clustering.terms import typical_terms
from kvc.errors import UserError

Say = Callable[[str], None]


def identity_of(
    items: Sequence[Item], embedder: Embedder, ks: Sequence[int], settings: KMeansSettings
) -> dict[str, Any]:
    """What decides the result: the questions, the embedder and its settings, and how they are clustered."""
    return {
        "data_hash": digest([list(item) for item in items]),
        "embedder": {"kind": embedder.kind, "settings": embedder.settings()},
        "k": sorted(ks),
        **vars(settings),
    }


def check_numbers(items: Sequence[Item], ks: Sequence[int]) -> None:
    """Refuse what cannot be clustered before anything is computed.

    Raises:
        UserError: If a number of clusters is below 1, given twice, or above that of the questions.
    """
    if len(set(ks)) < len(ks):
        raise UserError(f"--k {' '.join(map(str, ks))}: a number is given twice")
    for k in ks:
        if k < 1:
            raise UserError(f"--k {k}: give 1 or more")
        if k > len(items):
            raise UserError(f"--k {k}: there are only {len(items)} questions; give a smaller --k")


def build(
    target: Path,
    source: str,
    items: list[Item],
    embedder: Embedder,
    ks: Sequence[int],
    settings: KMeansSettings,
    say: Say = lambda text: None,
) -> None:
    """Embed, cluster and write everything, at once or not at all.

    Args:
        target: The folder; see `kvc.data.clustering.folder`. What it held is replaced.
        source: Where the questions come from, for the record.
        items: The questions.
        embedder: Turns them into vectors.
        ks: Numbers of clusters.
        settings: Of k-means.
        say: Told what has been done.

    Raises:
        UserError: If there are too few questions, or the embedder fails.
    """
    check_numbers(items, ks)
    questions = [item.problem for item in items]
    vectors = embedder.fit(questions)
    say(f"{len(items)} questions -> vectors of {vectors.shape[1]} dimensions")
    with replaced(target) as partial:
        labels = {}
        for k in sorted(ks):
            clusters = find_clusters(vectors, k, settings)
            labels[k] = clusters.labels
            _write_clusters(partial, source, items, vectors, clusters, settings)
            score = "" if clusters.silhouette is None else f", silhouette {clusters.silhouette:.3f}"
            say(f"k = {k}: {clusters.sizes.min()} to {clusters.sizes.max()} questions a cluster{score}")
        write_array(partial / EMBEDDINGS, vectors)
        write_questions(partial, items)
        embedder.save(partial)
        write_projector(partial / "projector", vectors, questions, labels)
        manifest = {
            "schema": SCHEMA,
            "source": source,
            "questions": len(items),
            "dimensions": vectors.shape[1],
            **identity_of(items, embedder, ks, settings),
            "versions": {name: version(name) for name in ("numpy", "scikit-learn")},
        }
        write_json(partial / MANIFEST, manifest)


def _write_clusters(
    folder: Path, source: str, items: list[Item], vectors: Vectors, clusters: Clusters, settings: KMeansSettings
) -> None:
    """Everything of one k."""
    home = folder / f"k{clusters.k}"
    distances_NK = np.sqrt(squared_distances(vectors, clusters.centroids))
    own_N = distances_NK[np.arange(len(items)), clusters.labels]
    terms = typical_terms([item.problem for item in items], clusters.labels, clusters.k)
    # Nearest first; equal questions stay in their order.
    members = [
        found[np.argsort(own_N[found], kind="stable")].tolist()
        for found in (np.flatnonzero(clusters.labels == number) for number in range(clusters.k))
    ]
    write_array(home / LABELS, clusters.labels)
    write_array(home / CENTROIDS, clusters.centroids)
    result = {
        "k": clusters.k,
        **vars(settings),
        "inertia": clusters.inertia,
        "iterations": clusters.iterations,
        "silhouette": clusters.silhouette,
        "nearest": [found[0] for found in members],
        "clusters": {str(number): sorted(found) for number, found in enumerate(members)},
        "labels": clusters.labels.tolist(),
    }
    write_json(home / "clustering_results.json", result)
    statistics = [
        {
            "cluster_id": number,
            "size": len(found),
            "share": len(found) / len(items),
            "distance_mean": float(own_N[found].mean()),
            "distance_max": float(own_N[found].max()),
            "nearest_problem": items[found[0]].problem,
            "terms": terms[number],
        }
        for number, found in enumerate(members)
    ]
    sizes = {"smallest": int(clusters.sizes.min()), "largest": int(clusters.sizes.max())}
    summary = {"questions": len(items), "k": clusters.k, "mean": len(items) / clusters.k, **sizes}
    write_json(home / "cluster_statistics.json", {"sizes": summary, "clusters": statistics})
    for number, found in enumerate(members):
        samples = [{"index": i, "distance": float(own_N[i]), **items[i]._asdict()} for i in found]
        about = {"cluster_id": number, "size": len(found), "terms": terms[number], "samples": samples}
        write_json(home / "clusters" / f"cluster_{number}.json", about)
    write_documents(folder / f"data_k{clusters.k}.json", [items[found[0]] for found in members])
    name = "/".join(source.removeprefix("hub:").split("/")[-2:])
    figure = draw_clusters(vectors, clusters, terms, f"{name}: {len(items)} questions in {clusters.k} clusters")
    write_png(figure, home / "clusters_visualization.png")
