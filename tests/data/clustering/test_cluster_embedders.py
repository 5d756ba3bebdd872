"""Vectors of questions: unit rows, the same alone and together, kept in files without pickles."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from word_problems import rows

from kvc.data.clustering.sentences import SentenceEmbedder
from kvc.data.clustering.tfidf import WEIGHTS, WORDS, TfidfSvd
from kvc.errors import UserError

QUESTIONS = [row["question"] for row in rows()]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[TfidfSvd, Path]:
    folder = tmp_path_factory.mktemp("embedder")
    embedder = TfidfSvd(dimensions=6)
    embedder.fit(QUESTIONS)
    embedder.save(folder)
    return embedder, folder


def test_rows_have_length_one_and_do_not_depend_on_each_other() -> None:
    embedder = TfidfSvd(dimensions=6)
    together = embedder.fit(QUESTIONS)
    assert together.shape == (24, 6)
    assert together.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-6)
    for number in (0, 11, 23):
        assert np.array_equal(embedder.embed([QUESTIONS[number]])[0], together[number])


def test_the_same_bits_twice_and_after_restoring(saved: tuple[TfidfSvd, Path]) -> None:
    embedder, folder = saved
    restored = TfidfSvd(dimensions=6)
    restored.restore(folder)
    new = ["How many eggs does a car lay?", *QUESTIONS]
    assert np.array_equal(restored.embed(new), embedder.embed(new))
    assert np.array_equal(TfidfSvd(dimensions=6).fit(QUESTIONS), embedder.embed(QUESTIONS))


def test_dimensions_are_bounded_by_what_there_is() -> None:
    assert TfidfSvd().fit(QUESTIONS[:4]).shape == (4, 4)
    assert TfidfSvd().fit(["two words", "words two"]).shape[1] <= 2


def test_unknown_words_have_no_direction(saved: tuple[TfidfSvd, Path]) -> None:
    assert not saved[0].embed(["zebra quark"]).any()


def test_no_words_at_all() -> None:
    with pytest.raises(UserError, match="no question holds a word"):
        TfidfSvd().fit(["1 + 2?", "3 + 4?"])
    with pytest.raises(UserError, match="--dimensions 0"):
        TfidfSvd(dimensions=0)


@pytest.mark.parametrize("name", [WORDS, WEIGHTS])
@pytest.mark.parametrize("content", [None, b"", b'["one"]', b"\x00" * 40])
def test_damage_is_noticed(saved: tuple[TfidfSvd, Path], tmp_path: Path, name: str, content: bytes | None) -> None:
    saved[0].save(tmp_path)
    (tmp_path / name).unlink() if content is None else (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match="missing or damaged"):
        TfidfSvd(dimensions=6).restore(tmp_path)


def test_sentence_transformers_is_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(UserError, match=r"--embeddings some/model needs sentence-transformers: pip install"):
        SentenceEmbedder("some/model").fit(QUESTIONS)


def test_a_sentence_model_runs_without_code_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    class Model:
        def __init__(self, name: str, **options: Any) -> None:
            if name == "own/code":
                raise ValueError("Loading own/code executes code.\nPlease pass the argument `trust_remote_code=True`.")
            seen.update(options, name=name)
            self.prompts = {"query": "query: "}

        def encode(self, questions: list[str], **options: Any) -> np.ndarray:
            seen.update(options)
            return np.array([[3.0, 4.0], [0.0, 0.0]])[: len(questions)]

    monkeypatch.setitem(sys.modules, "sentence_transformers", SimpleNamespace(SentenceTransformer=Model))
    vectors = SentenceEmbedder("some/model", prompt="query").fit(["a", "b"])
    np.testing.assert_allclose(vectors, [[0.6, 0.8], [0, 0]])
    assert vectors.dtype == np.float32
    assert (seen["name"], seen["trust_remote_code"], seen["prompt_name"]) == ("some/model", False, "query")
    with pytest.raises(UserError, match=r"--embeddings own/code: cannot be loaded without code of its own: Loading"):
        SentenceEmbedder("own/code").embed(["a"])
    with pytest.raises(UserError, match="--prompt passage: some/model has query"):
        SentenceEmbedder("some/model", prompt="passage").embed(["a"])
