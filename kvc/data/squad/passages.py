"""Synthetic passages in the form of SQuAD: facts about people and things, and questions about some of them."""

import random
import re

from kvc.data.squad.example import SquadExample, unanswerable
from kvc.data.synthetic.base import rng_for, sample_in_split
from kvc.data.synthetic.passages import UNKNOWN, Passage, Question, sample_passage
from kvc.data.synthetic.vocabulary import NAMES, THINGS
from kvc.errors import UserError

ENTITIES = frozenset([*NAMES, *THINGS])


def synthetic_squad(
    split: str, count: int, seed: int, facts: tuple[int, int] = (4, 30), unanswerable_share: float = 0.0
) -> list[SquadExample]:
    """Generated questions; the splits share no passage.

    Args:
        split: `train`, `val` or `test`.
        count: Number of questions.
        seed: Seed of the generator.
        facts: Fewest and most facts of a passage.
        unanswerable_share: Share of questions that the passage does not answer.
    """

    def sample(rng: random.Random) -> Passage:
        return sample_passage(rng, facts, unanswerable=unanswerable_share)

    found: list[SquadExample] = []
    number = 0
    while len(found) < count:
        rng = rng_for("squad", split, seed, number)
        passage = sample_in_split(rng, split, sample, lambda passage: passage.text)
        for index, question in enumerate(passage.questions):
            found.append(_example(f"{split}-{number}-{index}", passage.text, question))
        number += 1
    return found[:count]


def _example(key: str, context: str, question: Question) -> SquadExample:
    if question.answer == UNKNOWN:
        return unanswerable(key, context, question.question)
    start = answer_start(context, question)
    return SquadExample(key, context, question.question, (question.answer,), (start,))


def answer_start(context: str, question: Question) -> int:
    """Where the answer stands: in the sentence about the entity that is asked for, not in one with the same value.

    Raises:
        UserError: If no sentence holds both.
    """
    (entity,) = ENTITIES.intersection(re.findall(r"\w+", question.question))
    for sentence in re.finditer(r"[^.]+\.", context):
        words = set(re.findall(r"\w+", sentence[0]))
        if entity in words and (value := re.search(rf"\b{re.escape(question.answer)}\b", sentence[0])):
            return sentence.start() + value.start()
    raise UserError(f"the passage does not say {question.answer!r} of {entity}: {context[:80]!r}")
