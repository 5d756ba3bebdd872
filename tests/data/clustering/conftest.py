"""One folder of clusters for all tests that only read it."""

from pathlib import Path

import pytest
from word_problems import rows

from kvc.data.clustering.build import build
from kvc.data.clustering.items import Item, item_from_record
from kvc.data.clustering.kmeans import KMeansSettings
from kvc.data.clustering.tfidf import TfidfSvd


@pytest.fixture(scope="session")
def items() -> list[Item]:
    return [item_from_record("here", row) for row in rows()]


@pytest.fixture(scope="session")
def clusters(tmp_path_factory: pytest.TempPathFactory, items: list[Item]) -> Path:
    """Three and five clusters of 24 questions."""
    folder = tmp_path_factory.mktemp("made") / "clusters"
    build(folder, "some/questions.jsonl", items, TfidfSvd(), [5, 3], KMeansSettings())
    return folder
