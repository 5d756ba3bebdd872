"""One question with its samples, graded."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kvc.scoring.equality import kind_of, same
from kvc.scoring.extraction import extract
from kvc.scoring.files import Sampled
from kvc.scoring.passk import majority, pass_at_k


@dataclass(frozen=True)
class Graded:
    """A question in one arm of one file.

    Attributes:
        sampled: The samples.
        answers: What was extracted from each.
        correct: Whether each is right.
        vote: The answer of the majority.
        scores: Numbers of the question by metric.
    """

    sampled: Sampled
    answers: tuple[str | None, ...]
    correct: tuple[bool, ...]
    vote: str | None
    scores: dict[str, float]


def grade(sampled: Sampled, ks: Sequence[int]) -> Graded:
    """Extract and compare every answer of a question.

    `scores` holds `mean` (the share of right samples, which is pass@1), `pass@k`, `majority`, `answered` (the share of
    samples with an answer at all), and the mean of every cost.

    Args:
        sampled: The samples.
        ks: Sizes of draws for pass@k.

    Raises:
        ValueError: If a k is larger than the number of samples.
    """
    kind = kind_of(sampled.gold)
    answers = tuple(extract(response, kind) for response in sampled.responses)
    correct = tuple(same(answer, sampled.gold) for answer in answers)
    vote, majority_score = majority(answers, correct, same)
    count, right = len(answers), sum(correct)
    scores = {"mean": right / count}
    scores |= {f"pass@{k}": float(pass_at_k(count, right, k)) for k in ks}
    scores |= {"majority": majority_score, "answered": sum(answer is not None for answer in answers) / count}
    scores |= {name: float(np.mean(values)) for name, values in sampled.costs.items()}
    return Graded(sampled, answers, correct, vote, scores)
