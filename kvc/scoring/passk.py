"""What n samples of a question say about k of them: pass@k without bias, and the vote of the majority."""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike


def pass_at_k(samples: ArrayLike, correct: ArrayLike, k: int) -> np.ndarray:
    """The chance that at least one of k samples is right, estimated without bias from n >= k of them.

    1 - C(n - c, k) / C(n, k), as in Chen et al. 2021 (arXiv 2107.03374, equation 1). The quotient is the product of
    1 - c / (n - j) over j < k, and is summed as logarithms: no factorials, and no digits lost where it is close to 1.

    Args:
        samples: Number of samples n of each question, `[questions]` or a number.
        correct: How many of them are right, c, of the same shape.
        k: Size of the draw, from 1.

    Returns:
        `[questions]`, each in 0 to 1; exactly 1 where fewer than k samples are wrong.

    Raises:
        ValueError: If k is below 1 or above n, or c is not in 0 to n.
    """
    n, c = np.broadcast_arrays(np.asarray(samples, dtype=float), np.asarray(correct, dtype=float))
    if k < 1 or (n < k).any():
        raise ValueError(f"pass@{k} of {int(n.min())} samples: k must be from 1 to the number of samples")
    if ((c < 0) | (c > n)).any():
        raise ValueError("there are fewer samples than right ones")
    missed = c[..., None] / (n[..., None] - np.arange(k))
    with np.errstate(divide="ignore"):
        logs = np.log1p(-np.minimum(missed, 1.0)).sum(-1)
    return -np.expm1(logs)


def default_ks(samples: int) -> list[int]:
    """Powers of two up to the number of samples, and that number."""
    return sorted({2**i for i in range(samples.bit_length()) if 2**i <= samples} | {samples})


def majority(
    answers: Sequence[str | None], correct: Sequence[bool], same: Callable[[str | None, str], bool]
) -> tuple[str | None, float]:
    """The answer that most samples gave, and whether it is right.

    Answers that mean the same are one candidate, samples without an answer do not vote. Where several candidates have
    the most votes, one of them would be drawn: the score is the share of right ones among them.

    Args:
        answers: Of each sample.
        correct: Whether each is right.
        same: Whether two answers mean the same.

    Returns:
        The first answer with the most votes (None without any), and its score from 0 to 1.
    """
    votes: dict[str, int] = {}
    right: dict[str, bool] = {}
    for answer, fine in zip(answers, correct, strict=True):
        if answer is None:
            continue
        known = answer if answer in votes else next((other for other in votes if same(answer, other)), answer)
        votes[known] = votes.get(known, 0) + 1
        right.setdefault(known, fine)
    if not votes:
        return None, 0.0
    top = [answer for answer, count in votes.items() if count == max(votes.values())]
    return top[0], sum(right[answer] for answer in top) / len(top)
