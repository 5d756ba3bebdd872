"""When compressing a passage pays: after how many questions, or from which length of the passage on."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Cost(NamedTuple):
    """Seconds of one way of answering questions about a passage; numbers, or arrays of resamples.

    Attributes:
        once: Spent on the passage, however many questions there are.
        each: Spent on every question.
    """

    once: np.ndarray
    each: np.ndarray

    def total(self, questions: int) -> np.ndarray:
        """Seconds for so many questions."""
        return self.once + questions * self.each


def questions(ours: Cost, other: Cost) -> np.ndarray:
    """Number of questions from which `ours` takes no longer than `other`; infinite where it never does.

    Where ours is cheaper at the beginning, it is 0, also if it is dearer for each question: see `Cost.total` there.
    """
    extra, saved = ours.once - other.once, other.each - ours.each
    reached = np.divide(extra, saved, out=np.full(np.shape(extra), np.inf), where=saved > 0)
    return np.where(extra <= 0, 0.0, reached)


def length(lengths: Sequence[int], extra: Sequence[np.ndarray]) -> np.ndarray:
    """Length of the passage from which a way pays, on straight lines between measured lengths.

    Args:
        lengths: Measured, rising.
        extra: Seconds that it takes more than the other one, at each length, `[R]`.

    Returns:
        `[R]`: the shortest measured length where it pays there already (the true one may be shorter); infinite where
        it does not pay at the longest one. Where the sign changes more than once, the last change counts.
    """
    found = np.where(extra[-1] <= 0, float(lengths[0]), np.inf)
    for place in range(len(lengths) - 1):
        before, after = extra[place], extra[place + 1]
        step = np.divide(before, before - after, out=np.zeros(np.shape(before)), where=before > after)
        crossing = lengths[place] + step * (lengths[place + 1] - lengths[place])
        found = np.where((before > 0) & (after <= 0) & np.isfinite(found), crossing, found)
    return found
