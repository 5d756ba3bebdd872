r"""Passages of facts with extractive questions, in the manner of SQuAD.

Few relations and many entities per passage: with many relations, "a value of the right type" is nearly always the
answer and looks like reading. Every statement puts the value after the entity, and no two kinds of values share a
first word, so that an answer can be found by recalling what followed the entity. In a variant the passage does not
say it of the entity that is asked about, and the answer is `unknown`.

Examples (the last one is unanswerable):

    Passage: Emma lives in Paris. The home of Karl is in Rome. Noah lives in Rome. The lamp is in the hall.
    Question: Where does Karl live?
    Answer: Rome

    Passage: The bell is painted red. The color of the map is gold. Ida is 34 years old. The ring is painted red.
    Question: What is the color of the map?
    Answer: gold

    Passage: Ben works as a cook. The job of Lucy is nurse. Oscar works as a pilot. Tina works as a cook.
    Question: What is the job of Peter?
    Answer: unknown
"""

import random
from typing import NamedTuple

from kvc.data.synthetic.base import Segment
from kvc.data.synthetic.example import Example, Turn, text_chunks
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


UNKNOWN = "unknown"


def sample_facts(rng: random.Random, count: int) -> list[tuple[str, str, Relation]]:
    """Entity, value and relation of `count` facts; no entity has two values for one relation."""
    return [(entity, rng.choice(relation.values), relation) for entity, relation in _pairs(rng, count)]


def sample_passage(
    rng: random.Random,
    facts: tuple[int, int] = (4, 30),
    questions: tuple[int, int] = (1, 4),
    unanswerable: float = 0.0,
) -> Passage:
    """Draw a passage.

    Args:
        rng: Source of randomness.
        facts: Smallest and largest number of facts (inclusive).
        questions: Smallest and largest number of questions; never more than there are facts.
        unanswerable: Share of questions about an entity of which the passage does not say it; their answer is
            `unknown`.
    """
    known = sample_facts(rng, rng.randint(*facts))
    statements, asked = [], []
    for entity, value, relation in known:
        statements.append(rng.choice(relation.statements).format(e=entity, v=value))
        asked.append(Question(rng.choice(relation.questions).format(e=entity), value))
    count = min(len(asked), rng.randint(*questions))
    chosen = rng.sample(asked, count)
    if unanswerable:
        chosen = [_absent(rng, known) if rng.random() < unanswerable else question for question in chosen]
    return Passage(" ".join(statements), tuple(chosen))


def _absent(rng: random.Random, known: list[tuple[str, str, Relation]]) -> Question:
    """A question about an entity for which the passage does not give the relation, which it gives for others.

    Where the passage gives it for everybody, the relation is one that the passage does not have.
    """

    def strangers(relation: Relation) -> list[str]:
        told = {entity for entity, _, other in known if other is relation}
        return [entity for entity in (THINGS if relation in OBJECT else NAMES) if entity not in told]

    told = [relation for relation in (*PEOPLE, *OBJECT) if any(fact[2] is relation for fact in known)]
    possible = [relation for relation in told if strangers(relation)]
    relation = rng.choice(possible or [relation for relation in (*PEOPLE, *OBJECT) if relation not in told])
    return Question(rng.choice(relation.questions).format(e=rng.choice(strangers(relation))), UNKNOWN)


def same_kind(passage: Passage, answer: str) -> list[str]:
    """The values in the passage that have the type of the answer, which a reader who skips the entity confuses."""
    kind = next(relation.values for relation in (*PEOPLE, *OBJECT) if answer in relation.values)
    return [word for word in passage.text.replace(".", "").split() if word in kind]


def passage_example(passage: Passage, rng: random.Random) -> Example:
    r"""The passage as an example: a sentence per chunk, `\nQuestion: ...` as query, `\nAnswer:` as lead.

    The shortcut is a random value of the right type.
    """
    sentences = passage.text.split(". ")
    texts = [f"{sentence}{'.' if i < len(sentences) - 1 else ''}" for i, sentence in enumerate(sentences)]
    chunks = text_chunks(*(text if i == 0 else f" {text}" for i, text in enumerate(texts)))
    turns = tuple(
        Turn(f"\nQuestion: {question}", "\nAnswer:", (Segment(f" {answer}", "answer"),))
        for question, answer in passage.questions
    )
    gold = passage.questions[0].answer
    shortcut = None if gold == UNKNOWN else rng.choice(same_kind(passage, gold))
    return Example("Passage: ", chunks, turns, gold, shortcut=shortcut)
