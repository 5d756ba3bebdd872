"""Scores of answers by the official rules, and what shows that a model answers without reading."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from torchmetrics.functional.text import squad


class Score(NamedTuple):
    """One answer.

    Attributes:
        text: The prediction as it is scored.
        em: Whether it equals a gold answer after normalisation.
        f1: Overlap of words with the best gold answer, 0 to 1.
    """

    text: str
    em: bool
    f1: float


def answer_text(completion: str) -> str:
    """The first line of a completion, without blanks around it."""
    return completion.strip().split("\n", 1)[0].strip()


def score(prediction: str, golds: Sequence[str]) -> Score:
    """Score one answer as the official script does, which torchmetrics implements.

    Both are lower-cased and lose punctuation and the articles a, an, the; F1 counts words with repetition; the best of
    the gold answers counts. Where the only gold answer is empty, an empty prediction is right and any other wrong.

    Args:
        prediction: The answer, already cut out of the completion.
        golds: At least one; a single empty text for a question without an answer.
    """
    target: dict[str, Any] = {"id": "0", "answers": {"text": list(golds), "answer_start": [0] * len(golds)}}
    found = squad([{"id": "0", "prediction_text": prediction}], [target])
    return Score(prediction, bool(found["exact_match"] > 0), float(found["f1"]) / 100)


class Diversity(NamedTuple):
    """How many different answers a model gives.

    Attributes:
        predicted: Different predictions, as a share of all.
        gold: Different gold answers, as a share of all.
        collapsed: Whether the predictions differ much less than the gold answers.
    """

    predicted: float
    gold: float
    collapsed: bool


def diversity(predictions: Sequence[str], golds: Sequence[str], threshold: float = 0.25) -> Diversity:
    """The collapse alarm: a compressor that says nothing makes the model give the same few answers to everything.

    Args:
        predictions: One for each question.
        golds: First gold answers of the same questions.
        threshold: The alarm goes off where predictions are less diverse than this share of the gold answers' diversity.
            With fewer than two different gold answers it never does.
    """
    if len(predictions) != len(golds):
        raise ValueError(f"{len(predictions)} predictions for {len(golds)} questions")
    if not golds:
        return Diversity(0.0, 0.0, False)
    ours, theirs = len({_plain(text) for text in predictions}), len({_plain(text) for text in golds})
    # A single answer is a collapse however few the gold ones are.
    collapsed = theirs > 1 and (ours <= 1 or ours < threshold * theirs)
    return Diversity(ours / len(golds), theirs / len(golds), collapsed)


def normalised(value: float, without: float, full: float) -> float | None:
    """(m - m_without) / (m_full - m_without): 0 is as good as no context, 1 as the full text; None if they are equal.

    Args:
        value: A metric of the method.
        without: Of the model without the context.
        full: Of the model with the full text.
    """
    return None if full == without else (value - without) / (full - without)


def _plain(text: str) -> str:
    return " ".join(text.lower().split())
