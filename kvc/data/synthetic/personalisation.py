r"""Personalisation: a user's history of tagged notes, then a new note that the same user would tag.

Everybody has tags of their own for six of eight kinds of topics. A third of the tags are those that most users give,
so a guess without the history is better than chance, as with real users, and far from right.

Examples (the first is shown whole; of the others the first lines):

    History of Emma:                History of Karl:                 History of Ida:
    The note on bread is funny.     The note on the piano is sad.    The note on Rome is warm.
    The note on Paris is sad.       The note on blue is clever.      The note on golf is boring.
    The note on rice is funny.      ...                              ...
    The note on soup is funny.
"""

import random

from kvc.data.synthetic.base import Segment
from kvc.data.synthetic.example import Example, Turn
from kvc.data.synthetic.vocabulary import NAMES, TAGS, TOPICS

KINDS = 6
COMMON = 0.3  # chance that a user gives a kind the tag that most users give it


def sample_history(rng: random.Random, notes: tuple[int, int] = (4, 32), queries: int = 1) -> Example:
    """Draw a user, the history and queries about kinds that occur in it.

    Args:
        rng: Source of randomness.
        notes: Smallest and largest number of notes in the history (inclusive).
        queries: Number of queries, all about words that the history does not have.
    """
    kinds = rng.sample(range(len(TOPICS)), KINDS)
    tags = {kind: TAGS[kind] if rng.random() < COMMON else rng.choice(TAGS) for kind in kinds}
    used: set[str] = set()

    def draw(candidates: list[int]) -> tuple[int, str]:
        kind = rng.choice([kind for kind in candidates if any(word not in used for word in TOPICS[kind])])
        word = rng.choice([word for word in TOPICS[kind] if word not in used])
        used.add(word)
        return kind, f"The note on {word} is"

    chunks: list[tuple[Segment, ...]] = []
    seen: list[int] = []
    for _ in range(rng.randint(*notes)):
        kind, text = draw(kinds)
        tag = Segment(f" {tags[kind]}", "answer" if kind in seen else "context")
        chunks.append((Segment(text, "context"), tag, Segment(".\n", "context")))
        seen.append(kind)
    turns, answers = [], []
    for number in range(queries):
        kind, text = draw(seen)
        answer = (Segment(f" {tags[kind]}", "answer"), Segment(".", "context"))
        turns.append(Turn(f"{chr(10) if number else ''}{text}", "", answer))
        answers.append(tags[kind])
    return Example(f"History of {rng.choice(NAMES)}:\n", tuple(chunks), tuple(turns), answers[0])
