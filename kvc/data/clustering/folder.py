"""The folder of a clustering: what it holds, how it is written at once, how its parts are read back.

FOLDER/clusters.json                       the source, the settings, versions
FOLDER/questions.jsonl                     problem, reasoning, solution: a line a question
FOLDER/question_embeddings.npy             [N, D] float32, rows of length 1
FOLDER/embedder*                           what embeds another question
FOLDER/data_kK.json                        the question nearest to each centroid: documents to study
FOLDER/projector/                          for TensorBoard
FOLDER/kK/cluster_labels.npy               [N] int64         FOLDER/kK/centroids.npy   [K, D] float32
FOLDER/kK/clustering_results.json          assignments, inertia, silhouette
FOLDER/kK/cluster_statistics.json          sizes, distances, typical words
FOLDER/kK/clusters_visualization.png       two principal components
FOLDER/kK/clusters/cluster_I.json          the questions of one cluster, nearest to its centroid first
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvc.core.files import atomic, write_json, write_text
from kvc.data.clustering.items import Item
from kvc.errors import UserError

MANIFEST, QUESTIONS, EMBEDDINGS = "clusters.json", "questions.jsonl", "question_embeddings.npy"
LABELS, CENTROIDS = "cluster_labels.npy", "centroids.npy"
SCHEMA = 1


@contextmanager
def replaced(folder: Path) -> Iterator[Path]:
    """Yield an empty folder beside `folder`; on success it takes its place, on failure it is removed.

    The caller keeps other processes out. What a killed process left there is removed first.
    """
    folder = folder.resolve()
    partial, old = (folder.with_name(f".{folder.name}.{state}") for state in ("partial", "replaced"))
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        partial.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_output(folder: Path) -> dict[str, Any] | None:
    """What was clustered there before; None if nothing was.

    Raises:
        UserError: If it is a file, or holds something else.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output {folder}: that is a file, not a folder")
    if (folder / MANIFEST).is_file():
        return read_manifest(folder)
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"--output {folder}: the folder is not empty and holds no clusters")
    return None


def read_manifest(folder: Path) -> dict[str, Any]:
    """`clusters.json`.

    Raises:
        UserError: If it is missing or damaged.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder} holds no clusters: python -m kvc cluster QUESTIONS --output {folder}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / MANIFEST} is damaged: {error}") from None
    if not isinstance(manifest, dict) or manifest.get("schema") != SCHEMA:
        raise UserError(f"{folder / MANIFEST} is damaged, or was written by another version")
    return manifest


def read_questions(folder: Path, number: int) -> list[Item]:
    """The `number` questions.

    Raises:
        UserError: If the file is missing or damaged.
    """
    path = folder / QUESTIONS
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        items = [Item(**json.loads(line)) for line in lines]
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} is missing or damaged: {error}") from None
    if len(items) != number:
        raise UserError(f"{path} is damaged: it holds {len(items)} questions, not {number}")
    return items


def read_array(path: Path, *shape: int) -> NDArray[Any]:
    """An array; nothing in it is unpickled.

    Args:
        path: A `.npy` file.
        shape: What it must have.

    Raises:
        UserError: If it is missing, damaged or of another shape.
    """
    try:
        array: NDArray[Any] = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path} is missing or damaged: {error}") from None
    if array.shape != shape:
        raise UserError(f"{path} is damaged: its shape is {array.shape}, not {shape}")
    return array


def write_array(path: Path, array: NDArray[Any]) -> None:
    """Write an array; nothing in it is pickled."""
    with atomic(path) as temporary, temporary.open("wb") as file:
        np.save(file, array, allow_pickle=False)


def write_questions(folder: Path, items: list[Item]) -> None:
    """Write all questions."""
    lines = (json.dumps(item._asdict(), ensure_ascii=True) for item in items)
    write_text(folder / QUESTIONS, "".join(f"{line}\n" for line in lines))


def write_documents(path: Path, items: list[Item]) -> None:
    """Write questions as documents with the keys problem, reasoning and solution."""
    write_json(path, [item._asdict() for item in items])
