"""Passages of facts with extractive questions, in the manner of SQuAD.

Few relations and many entities per passage: with many relations, "a value of the right type" is nearly always the
answer and looks like reading. Every statement puts the value after the entity, and no two kinds of values share a
first word, so that an answer can be found by recalling what followed the entity.
"""

import random
from typing import NamedTuple

from kvc.data.synthetic.base import Document, Segment
from kvc.data.synthetic.vocabulary import CITIES, COLORS, FOODS, JOBS, NAMES, PETS, ROOMS, SPORTS, THINGS


class Relation(NamedTuple):
    """A kind of fact: its possible values, statements and questions with `{e}` (entity) and `{v}` (value)."""

    values: list[str]
    statements: tuple[str, ...]
    questions: tuple[str, ...]


class Question(NamedTuple):
    """A question about a passage and its answer, which occurs in the passage literally."""

    question: str
    answer: str


class Passage(NamedTuple):
    """Facts and questions about some of them."""

    text: str
    questions: tuple[Question, ...]


AGES = [str(age) for age in range(10, 100)]
PEOPLE = (
    Relation(
        CITIES,
        ("{e} lives in {v}.", "The home of {e} is in {v}."),
        ("Where does {e} live?", "In which city is the home of {e}?"),
    ),
    Relation(
        JOBS, ("{e} works as a {v}.", "The job of {e} is {v}."), ("What does {e} work as?", "What is the job of {e}?")
    ),
    Relation(
        PETS,
        ("{e} has a pet {v}.", "The pet of {e} is a {v}."),
        ("Which pet does {e} have?", "What is the pet of {e}?"),
    ),
    Relation(
        FOODS,
        ("{e} likes to eat {v}.", "The lunch of {e} is {v}."),
        ("What does {e} like to eat?", "What is the lunch of {e}?"),
    ),
    Relation(
        SPORTS,
        ("{e} likes {v}.", "The sport of {e} is {v}."),
        ("Which sport does {e} like?", "What is the sport of {e}?"),
    ),
    Relation(AGES, ("{e} is {v} years old.", "The age of {e} is {v}."), ("How old is {e}?", "What is the age of {e}?")),
)
OBJECT = (
    Relation(
        ROOMS,
        ("The {e} is in the {v}.", "You can find the {e} in the {v}."),
        ("Where is the {e}?", "In which room is the {e}?"),
    ),
    Relation(
        COLORS,
        ("The {e} is painted {v}.", "The color of the {e} is {v}."),
        ("What color is the {e}?", "What is the color of the {e}?"),
    ),
)


def _pairs(rng: random.Random, count: int) -> list[tuple[str, Relation]]:
    """Distinct (entity, relation) pairs: one or two relations, more only where their entities do not suffice."""
    relations = rng.sample([*PEOPLE, *OBJECT], len(PEOPLE) + len(OBJECT))
    pairs: list[tuple[str, Relation]] = []
    used = 0
    wanted = rng.choice((1, 2, 2, 3, 4))
    while used < wanted or len(pairs) < count:
        relation = relations[used]
        entities = THINGS if relation in OBJECT else NAMES
        share = -(-count // wanted)
        pairs += [(entity, relation) for entity in rng.sample(entities, min(len(entities), share))]
        used += 1
    return rng.sample(pairs, count)


def sample_passage(
    rng: random.Random, facts: tuple[int, int] = (4, 30), questions: tuple[int, int] = (1, 4)
) -> Passage:
    """Draw a passage.

    Args:
        rng: Source of randomness.
        facts: Smallest and largest number of facts (inclusive).
        questions: Smallest and largest number of questions; never more than there are facts.
    """
    statements, asked = [], []
    for entity, relation in _pairs(rng, rng.randint(*facts)):
        value = rng.choice(relation.values)
        statements.append(rng.choice(relation.statements).format(e=entity, v=value))
        asked.append(Question(rng.choice(relation.questions).format(e=entity), value))
    count = min(len(asked), rng.randint(*questions))
    return Passage(" ".join(statements), tuple(rng.sample(asked, count)))


def passage_document(passage: Passage) -> Document:
    r"""The passage as a training document: `Passage: ...`, then `Question: ...\nAnswer: value` for each question."""
    document = [Segment(f"Passage: {passage.text}", "context")]
    for question, answer in passage.questions:
        document += [Segment(f"\nQuestion: {question}\nAnswer:", "context"), Segment(f" {answer}", "answer")]
    return document
