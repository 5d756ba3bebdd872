r"""In-context learning: labelled demonstrations of a random mapping, then a query with options.

Four kinds of words (cities, pets ...) get four of ten labels at random, so nothing but the demonstrations says which
label a kind has. The word of the query is in no demonstration: the kind must be recognised, not the word.

Examples (the first demonstrations of three items; the first is shown whole):

    Input: cat                Input: red               Input: pizza
    Output: beta              Output: zeta             Output: alpha
    Input: Paris              Input: garden            Input: nurse
    Output: zeta              Output: omega            Output: theta
    Options: zeta, gamma, beta, kappa                  ...
    Input: dog                ...
    Output: beta
"""

import random

from kvc.data.synthetic.base import Segment
from kvc.data.synthetic.example import Example, Turn
from kvc.data.synthetic.vocabulary import LABELS, TOPICS

CLASSES = 4


def sample_in_context(rng: random.Random, demonstrations: tuple[int, int] = (1, 16), queries: int = 1) -> Example:
    """Draw a mapping, its demonstrations and queries.

    A demonstration's label is of kind `answer` when an earlier one has shown the label of its kind.

    Args:
        rng: Source of randomness.
        demonstrations: Smallest and largest number of demonstrations (inclusive).
        queries: Number of queries, all about new words.
    """
    kinds = rng.sample(TOPICS, CLASSES)
    labels = rng.sample(LABELS, CLASSES)
    used: set[str] = set()

    def draw() -> tuple[int, str]:
        kind = rng.randrange(CLASSES)
        word = rng.choice([word for word in kinds[kind] if word not in used])
        used.add(word)
        return kind, word

    chunks, seen = [], set()
    for _ in range(rng.randint(*demonstrations)):
        kind, word = draw()
        label = Segment(f" {labels[kind]}", "answer" if kind in seen else "context")
        chunks.append((Segment(f"Input: {word}\nOutput:", "context"), label, Segment("\n", "context")))
        seen.add(kind)
    turns, answers = [], []
    options = rng.sample(labels, CLASSES)
    for number in range(queries):
        kind, word = draw()
        query = f"{chr(10) if number else ''}Options: {', '.join(options)}\nInput: {word}"
        turns.append(Turn(query, "\nOutput:", (Segment(f" {labels[kind]}", "answer"),)))
        answers.append(labels[kind])
    return Example("", tuple(chunks), tuple(turns), answers[0], choices=tuple(options), shortcut=options[0])
