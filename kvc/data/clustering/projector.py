"""The questions for TensorBoard's embedding projector."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvc.data.clustering.embedder import Vectors

LONGEST = 300  # characters of a question


def write_projector(
    folder: Path, vectors: Vectors, questions: Sequence[str], labels: Mapping[int, NDArray[np.int64]]
) -> None:
    """Write embeddings and metadata: the question, its number, and its cluster for every k.

    Args:
        folder: What `tensorboard --logdir` shall show.
        vectors: `[N, D]`.
        questions: Their texts.
        labels: k to the cluster of each question.
    """
    from torch import from_numpy
    from torch.utils import tensorboard

    # A row of the metadata is a line whose columns are parted by tabs.
    texts = [" ".join(question.split())[:LONGEST] for question in questions]
    columns = [texts, [str(i) for i in range(len(texts))], *(found.astype(str).tolist() for found in labels.values())]
    header = ["question", "index", *(f"cluster_k{k}" for k in labels)]
    open_writer: Any = tensorboard.SummaryWriter  # its annotations are incomplete
    writer = open_writer(str(folder))
    writer.add_embedding(
        from_numpy(vectors), [list(row) for row in zip(*columns)], metadata_header=header, tag="questions"
    )
    writer.close()
