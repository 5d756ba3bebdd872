r"""Dialogue: two people tell each other about themselves, and later turns refer back to it.

A line per turn. What somebody has told can be predicted when it comes back ("As I said, I live in Paris."), and only
from the earlier turns; the last turn, which is graded, always refers back to two facts, or to one if there is one.

Examples (the first is shown whole; of the others the first lines):

    Emma: I live in Paris.                   Karl: Hello, Ida.                 Noah: I am 34 years old.
    Karl: Oh, really? I work as a cook.      Ida: What is your job?            Tina: My sport is golf.
    Emma: That is good to hear.              Karl: I work as a baker.          Noah: You told me that your sport is golf.
    Karl: You told me that you live in Paris, and I told you that I work as a cook.
"""

import random
from typing import NamedTuple

from kvc.data.synthetic.base import Segment
from kvc.data.synthetic.example import Example, Turn
from kvc.data.synthetic.passages import AGES
from kvc.data.synthetic.vocabulary import CITIES, FOODS, JOBS, NAMES, PETS, SPORTS


class Trait(NamedTuple):
    """Something that people say about themselves: values, and `me`, `you` and question forms with `{v}` at the end."""

    values: list[str]
    me: str
    you: str
    question: str


TRAITS = (
    Trait(CITIES, "I live in", "you live in", "Where do you live?"),
    Trait(JOBS, "I work as a", "you work as a", "What is your job?"),
    Trait(PETS, "my pet is a", "your pet is a", "Which pet do you have?"),
    Trait(FOODS, "I like to eat", "you like to eat", "What do you like to eat?"),
    Trait(SPORTS, "my sport is", "your sport is", "What is your sport?"),
    Trait(AGES, "my age is", "your age is", "How old are you?"),
)
SMALL_TALK = (
    "That is good to hear.",
    "Oh, really?",
    "Tell me more.",
    "Let us talk about something else.",
    "The weather is nice today.",
    "I see.",
)


class _Talk:
    """The state of a conversation: who has told what."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.people = rng.sample(NAMES, 2)
        self.values = {
            (person, trait.me): rng.choice(trait.values) for person in self.people for trait in TRAITS
        }
        self.told: list[tuple[str, Trait]] = []
        self.asked: Trait | None = None

    def other(self, speaker: str) -> str:
        return self.people[1 - self.people.index(speaker)]

    def recall(self, speaker: str, facts: list[tuple[str, Trait]]) -> list[Segment]:
        """`You told me that you live in Paris, and I told you that ...`"""
        segments = []
        for number, (person, trait) in enumerate(facts):
            mine = person == speaker
            opening = "I told you that" if mine else "you told me that"
            joined = f" {opening[0].upper()}{opening[1:]}" if number == 0 else f", and {opening}"
            segments += [
                Segment(f"{joined} {trait.me if mine else trait.you}", "context"),
                Segment(f" {self.values[person, trait.me]}", "answer"),
            ]
        return [*segments, Segment(".", "context")]

    def turn(self, speaker: str) -> list[Segment]:
        """What the speaker says next: an answer, a fact, a reference, a question or small talk."""
        rng = self.rng
        fresh = [trait for trait in TRAITS if (speaker, trait) not in self.told]
        if self.asked is not None:
            trait, self.asked = self.asked, None
            return self._tell(speaker, trait)
        choice = rng.random()
        if choice < 0.45 and fresh:
            return self._tell(speaker, rng.choice(fresh))
        if choice < 0.65 and self.told:
            return self.recall(speaker, [rng.choice(self.told)])
        if choice < 0.85:
            self.asked = rng.choice(TRAITS)
            return [Segment(f" {self.asked.question}", "context")]
        return [Segment(f" {rng.choice(SMALL_TALK)}", "context")]

    def _tell(self, speaker: str, trait: Trait) -> list[Segment]:
        again = (speaker, trait) in self.told
        if not again:
            self.told.append((speaker, trait))
        text = f" As I said, {trait.me}" if again else f" {trait.me[0].upper()}{trait.me[1:]}"
        value = Segment(f" {self.values[speaker, trait.me]}", "answer" if again else "context")
        return [Segment(text, "context"), value, Segment(".", "context")]


def sample_dialogue(rng: random.Random, turns: tuple[int, int] = (2, 12)) -> Example:
    """Draw a conversation.

    Args:
        rng: Source of randomness.
        turns: Smallest and largest number of turns before the graded one (inclusive).
    """
    talk = _Talk(rng)
    count = rng.randint(*turns)
    chunks: list[tuple[Segment, ...]] = []
    speaker = talk.people[0]
    for number in range(count):
        said = talk.turn(speaker)
        if number == count - 1 and not talk.told:
            said = talk._tell(speaker, rng.choice(TRAITS))
        chunks.append((Segment(f"{speaker}:", "context"), *said, Segment("\n", "context")))
        speaker = talk.other(speaker)
    facts = rng.sample(talk.told, min(2, len(talk.told)))
    answer = talk.recall(speaker, facts)
    gold = "".join(segment.text for segment in answer).strip()
    return Example("", tuple(chunks), (Turn(f"{speaker}:", "", tuple(answer)),), gold)
