"""What the tiny model reads at each moment of its training.

Recall from the context is the bottleneck and appears as a sudden change: repeated words first, then key-value lists
and short passages, and only then long passages and arithmetic. One run of about 9 million tokens follows the tables
below; between two rows every number is interpolated linearly.
"""

import random
from typing import NamedTuple

from kvc.data.synthetic.base import Document, sample_in_split
from kvc.data.synthetic.helpers import drill, lookup, repeat
from kvc.data.synthetic.passages import passage_document, sample_passage
from kvc.data.synthetic.reasoning import problem_document, sample_problem

TASKS = ("repeat", "lookup", "passages", "drill", "reasoning")


class Row(NamedTuple):
    """The mixture at one point of the training.

    Attributes:
        progress: Share of the training tokens seen so far, 0..1.
        weights: Share of the documents of each task, in the order of `TASKS`; normalised when used.
        pairs: Largest number of pairs in a lookup list.
        facts: Largest number of facts in a passage.
        steps: Largest number of steps in a problem.
    """

    progress: float
    weights: tuple[float, ...]
    pairs: float
    facts: float
    steps: float


SCHEDULE = (
    #   progress  repeat lookup passages drill reasoning  pairs facts steps
    Row(0.00, (1.00, 0.00, 0.00, 0.00, 0.00), 8, 4, 2),
    Row(0.05, (1.00, 0.00, 0.00, 0.00, 0.00), 8, 4, 2),
    Row(0.06, (0.40, 0.25, 0.35, 0.00, 0.00), 8, 4, 2),
    Row(0.12, (0.35, 0.30, 0.35, 0.00, 0.00), 12, 4, 2),
    Row(0.17, (0.10, 0.45, 0.45, 0.00, 0.00), 16, 4, 2),
    Row(0.24, (0.05, 0.40, 0.40, 0.15, 0.00), 16, 8, 2),
    Row(0.30, (0.03, 0.15, 0.35, 0.22, 0.25), 16, 12, 2),
    Row(0.50, (0.01, 0.05, 0.35, 0.17, 0.42), 16, 24, 5),
    Row(0.65, (0.01, 0.04, 0.30, 0.15, 0.50), 16, 30, 8),
    Row(0.80, (0.00, 0.03, 0.25, 0.12, 0.60), 16, 30, 10),
    Row(1.00, (0.00, 0.02, 0.25, 0.08, 0.65), 16, 30, 10),
)


def row_at(progress: float, schedule: tuple[Row, ...] = SCHEDULE) -> Row:
    """The interpolated mixture at `progress`, which is clamped to 0..1."""
    progress = min(max(progress, 0.0), 1.0)
    after = next(i for i, row in enumerate(schedule) if row.progress >= progress)
    if after == 0:
        return schedule[0]
    low, high = schedule[after - 1], schedule[after]
    share = (progress - low.progress) / (high.progress - low.progress)

    def mix(a: float, b: float) -> float:
        return a + share * (b - a)

    weights = tuple(mix(a, b) for a, b in zip(low.weights, high.weights))
    return Row(progress, weights, mix(low.pairs, high.pairs), mix(low.facts, high.facts), mix(low.steps, high.steps))


class Mixture:
    """Training documents whose mixture and difficulty follow a schedule.

    Problems and passages come from the train split only.

    Args:
        schedule: Rows in order of progress, the first at 0 and the last at 1.
    """

    def __init__(self, schedule: tuple[Row, ...] = SCHEDULE) -> None:
        assert (schedule[0].progress, schedule[-1].progress) == (0, 1), "a schedule covers 0..1"
        self.schedule = schedule

    def document(self, rng: random.Random, progress: float) -> Document:
        """One document; the same `rng` state and `progress` give the same document.

        Args:
            rng: Source of randomness.
            progress: Share of the training tokens seen so far, 0..1.
        """
        row = row_at(progress, self.schedule)
        task = rng.choices(TASKS, row.weights)[0]
        if task == "repeat":
            return repeat(rng)
        if task == "lookup":
            return lookup(rng, (4, round(row.pairs)))
        if task == "drill":
            return drill(rng)
        if task == "passages":
            facts = (2, round(row.facts))
            passage = sample_in_split(rng, "train", lambda r: sample_passage(r, facts), lambda item: item.text)
            return passage_document(passage)
        steps = (1, round(row.steps))
        problem = sample_in_split(rng, "train", lambda r: sample_problem(r, steps), lambda item: item.question)
        return problem_document(problem)
