r"""Long documents whose late sentences can be predicted only from facts told much earlier.

A document is a row of sections of about 100 tokens. Some tell many facts, some tell none, and later ones remind of
facts of earlier sections; how the three kinds alternate differs from document to document, so information is spread
unevenly over any fixed segmentation. The graded sentence is a last reminder.

Examples (beginnings of sections of three documents):

    Section 1. On Monday it was cold. Emma lives in Paris. The age of Karl is 34. The lamp is in the hall. ...
    Section 5. Remember that Emma lives in Paris. On Friday it was dry. Remember that the age of Karl is 34. ...
    Section 9. Oscar looked at the map. On Sunday it was hot and windy. Nina looked at the clock. ...
"""

import random
import re
from typing import Literal

from kvc.data.synthetic.base import Segment
from kvc.data.synthetic.example import Example, Turn
from kvc.data.synthetic.passages import OBJECT, PEOPLE, Relation
from kvc.data.synthetic.vocabulary import DAYS, NAMES, THINGS, WEATHER

SECTION = 100  # tokens, about
Fact = tuple[str, str]  # a statement up to its value, and the value with the full stop
SectionKind = Literal["facts", "filler", "reminders"]


def count_tokens(text: str) -> int:
    """Tokens of generated text in the tiny model's tokenizer: words, numbers and signs, each one."""
    return len(re.findall(r"[A-Za-z]+|\d{1,2}|[^\w\s]|\n", text))


def filler(rng: random.Random) -> str:
    """A sentence that nothing later asks for."""
    if rng.random() < 0.5:
        return f"On {rng.choice(DAYS)} it was {rng.choice(WEATHER)} and {rng.choice(WEATHER)}."
    return f"{rng.choice(NAMES)} looked at the {rng.choice(THINGS)}."


def draw_facts(rng: random.Random) -> list[Fact]:
    """Statements about all entities, in random order; no entity and relation twice."""
    relations: list[Relation] = rng.sample([*PEOPLE, *OBJECT], rng.randint(2, 4))
    facts = []
    for relation in relations:
        for entity in rng.sample(THINGS if relation in OBJECT else NAMES, 20):
            statement = rng.choice(relation.statements).replace("{e}", entity)
            before, after = statement.split(" {v}")
            facts.append((before, f" {rng.choice(relation.values)}{after}"))
    rng.shuffle(facts)
    return facts


def reminder(fact: Fact) -> list[Segment]:
    """A sentence that repeats a fact; its value is the answer."""
    before, after = fact
    if before.startswith(("The ", "You ")):  # names keep their capital
        before = before[0].lower() + before[1:]
    value, rest = re.fullmatch(r"( \w+)(.*)", after).groups()  # type: ignore[union-attr]
    return [
        Segment(f" Remember that {before}", "context"),
        Segment(value, "answer"),
        Segment(rest, "context"),
    ]


def _section(rng: random.Random, number: int, kind: SectionKind, fresh: list[Fact], told: list[Fact]) -> list[Segment]:
    """One section; moves facts from `fresh` to the result of the section, which the caller adds to `told`."""
    segments = [Segment(f"{chr(10) if number > 1 else ''}Section {number}.", "context")]
    share = {"facts": 0.85, "filler": 0.1, "reminders": 0.1}[kind]
    tokens = 0
    while tokens < SECTION:
        if told and kind == "reminders" and rng.random() < 0.7:
            added = reminder(rng.choice(told))
        elif fresh and rng.random() < share:
            before, after = fresh.pop()
            added = [Segment(f" {before}{after}", "context")]
        else:
            added = [Segment(f" {filler(rng)}", "context")]
        segments += added
        tokens += sum(count_tokens(segment.text) for segment in added)
    return segments


def _closing(rng: random.Random, number: int, early: list[Fact], tokens: int) -> tuple[Segment, ...]:
    """A section of reminders alone; what it has said before is no answer any more when it comes again."""
    segments = [Segment(f"\nSection {number}.", "context")]
    order = rng.sample(early, len(early))
    written = turn = 0
    while written < tokens:
        added = reminder(order[turn % len(order)])
        if turn >= len(order):
            added = [segment._replace(kind="context") for segment in added]
        segments += added
        written += sum(count_tokens(segment.text) for segment in added)
        turn += 1
    return tuple(segments)


def tells_fact(segment: Segment) -> bool:
    """Whether a segment of a document states a fact for the first time."""
    told = segment.text.lstrip()
    other = told.startswith(("On ", "Section ", "Remember ")) or " looked at the " in told
    # What follows the value in a reminder (" years old.") is short.
    return segment.kind == "context" and told.endswith(".") and len(told.split()) > 2 and not other


def sample_document(rng: random.Random, tokens: tuple[int, int] = (512, 4096), closing: int = 0) -> Example:
    """Draw a document.

    Args:
        rng: Source of randomness.
        tokens: Smallest and largest number of tokens of the whole document (inclusive, up to one section off).
        closing: Number of tokens, at least, of one more section, in which every sentence reminds of an early fact.
    """
    sections = max(2, rng.randint(*tokens) // (SECTION + 6))
    fresh = draw_facts(rng)
    everything = list(fresh)
    told: list[Fact] = []
    chunks = []
    for number in range(1, sections + 1):
        late = number / sections
        kinds: tuple[SectionKind, ...] = ("facts", "filler", "reminders")
        kind = "facts" if number == 1 else rng.choices(kinds, (1.2 - late, 0.6, late))[0]
        chunks.append(tuple(_section(rng, number, kind, fresh, told)))
        told = everything[len(fresh) :][::-1]
    early = told[: max(1, len(told) * 3 // 4)]
    if closing:
        chunks.append(_closing(rng, len(chunks) + 1, early, closing))
    before, value, rest = (segment.text for segment in reminder(rng.choice(early)))
    answer = (Segment(value, "answer"), Segment(rest, "context"))
    return Example("", tuple(chunks), (Turn(before, "", answer),), value.strip())
