"""What the tiny model reads at each moment of its training.

Recall from the context is the bottleneck and appears as a sudden change: repeated words first, then key-value lists
and short passages, and only then everything else. Between two rows of the table every number is interpolated
linearly. Sizes grow to those that are used: there is no generalisation to longer chains or texts.
"""

import random
from typing import NamedTuple

from kvc.data.prompts import SYSTEM
from kvc.data.synthetic.base import Document, sample_in_split
from kvc.data.synthetic.dialogue import sample_dialogue
from kvc.data.synthetic.documents import sample_document
from kvc.data.synthetic.example import Example, chat, plain
from kvc.data.synthetic.helpers import drill, lookup, repeat, sort
from kvc.data.synthetic.in_context import sample_in_context
from kvc.data.synthetic.passages import passage_example, sample_passage
from kvc.data.synthetic.personalisation import sample_history
from kvc.data.synthetic.reasoning import problem_example, sample_problem
from kvc.data.synthetic.study import sample_study, study_chat

HELPERS = ("repeat", "lookup", "drill", "sort")
FAMILIES = ("passages", "reasoning", "in_context", "personalisation", "dialogue", "study", "documents")
CHAT = 0.2  # share of the items that are laid out as a conversation
UNANSWERABLE = (0.25, 0.4)  # share of passages that have unanswerable questions, and of such questions in them
SHORTEST_DOCUMENT = 200  # tokens


class Row(NamedTuple):
    """The mixture at one point of the training.

    Attributes:
        progress: Share of the training steps done so far, 0..1.
        helpers: Weights of the documents of each helper task, in the order of `HELPERS`.
        families: The same for the tasks, in the order of `FAMILIES`.
        pairs: Largest number of pairs in a lookup list.
        facts: Largest number of facts in a passage.
        steps: Largest number of steps in a problem.
        tokens: Largest number of tokens in a long document.
    """

    progress: float
    helpers: tuple[float, ...]
    families: tuple[float, ...]
    pairs: float
    facts: float
    steps: float
    tokens: float


SCHEDULE = (
    #           repeat lookup drill sort    passag reason in_con person dialog study  docum   pairs facts steps tokens
    Row(0.000, (1.00, 0.00, 0.00, 0.00), (0.00, 0.00, 0.00, 0.00, 0.00, 0.00, 0.00), 8, 4, 2, 256),
    Row(0.020, (1.00, 0.00, 0.00, 0.00), (0.00, 0.00, 0.00, 0.00, 0.00, 0.00, 0.00), 8, 4, 2, 256),
    Row(0.024, (0.40, 0.25, 0.00, 0.00), (0.35, 0.00, 0.00, 0.00, 0.00, 0.00, 0.00), 8, 4, 2, 256),
    Row(0.048, (0.35, 0.30, 0.00, 0.00), (0.35, 0.00, 0.00, 0.00, 0.00, 0.00, 0.00), 12, 4, 2, 256),
    Row(0.065, (0.10, 0.45, 0.00, 0.00), (0.45, 0.00, 0.00, 0.00, 0.00, 0.00, 0.00), 16, 4, 2, 256),
    Row(0.090, (0.05, 0.30, 0.15, 0.15), (0.35, 0.00, 0.05, 0.03, 0.00, 0.00, 0.00), 16, 8, 2, 256),
    Row(0.120, (0.03, 0.10, 0.18, 0.15), (0.22, 0.20, 0.08, 0.05, 0.02, 0.02, 0.00), 16, 12, 2, 256),
    Row(0.220, (0.01, 0.05, 0.15, 0.06), (0.22, 0.35, 0.08, 0.05, 0.03, 0.04, 0.02), 16, 24, 4, 512),
    Row(0.350, (0.01, 0.03, 0.12, 0.03), (0.19, 0.43, 0.07, 0.05, 0.03, 0.04, 0.03), 16, 30, 10, 1024),
    Row(0.500, (0.00, 0.03, 0.09, 0.02), (0.17, 0.48, 0.06, 0.05, 0.03, 0.04, 0.03), 16, 30, 16, 2048),
    Row(0.650, (0.00, 0.02, 0.07, 0.01), (0.16, 0.53, 0.05, 0.05, 0.03, 0.04, 0.03), 16, 30, 16, 4000),
    Row(1.000, (0.00, 0.02, 0.05, 0.01), (0.16, 0.55, 0.05, 0.05, 0.03, 0.04, 0.03), 16, 30, 16, 4000),
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

    return Row(
        progress,
        tuple(map(mix, low.helpers, high.helpers)),
        tuple(map(mix, low.families, high.families)),
        *map(mix, low[3:], high[3:]),
    )


class Mixture:
    """Training documents whose mixture and difficulty follow a schedule.

    Items come from the train split only, a fifth of them laid out as conversations.

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
            progress: Share of the training steps done so far, 0..1.
        """
        row = row_at(progress, self.schedule)
        name = rng.choices((*HELPERS, *FAMILIES), (*row.helpers, *row.families))[0]
        if name == "repeat":
            return repeat(rng)
        if name == "lookup":
            return lookup(rng, (4, round(row.pairs)))
        if name == "drill":
            return drill(rng)
        if name == "sort":
            return sort(rng)
        example = sample_in_split(rng, "train", lambda r: draw(r, name, row), lambda item: item.material)
        return laid_out(rng, name, example)


def draw(rng: random.Random, family: str, row: Row) -> Example:
    """An item of a family at the difficulty of a row; several questions each where the family has them."""
    if family == "passages":
        share = UNANSWERABLE[1] if rng.random() < UNANSWERABLE[0] else 0.0
        return passage_example(sample_passage(rng, (2, round(row.facts)), unanswerable=share), rng)
    if family == "reasoning":
        return problem_example(sample_problem(rng, (1, round(row.steps))))
    if family == "in_context":
        return sample_in_context(rng, queries=rng.randint(1, 4))
    if family == "personalisation":
        return sample_history(rng, queries=rng.randint(1, 4))
    if family == "dialogue":
        return sample_dialogue(rng)
    if family == "study":
        return sample_study(rng)
    # Lengths are spread evenly on a logarithmic scale: long documents are rare.
    tokens = round(SHORTEST_DOCUMENT * (row.tokens / SHORTEST_DOCUMENT) ** rng.random())
    return sample_document(rng, (tokens, tokens))


def laid_out(rng: random.Random, family: str, example: Example) -> Document:
    """The plain layout or, for a share of `CHAT`, a conversation; problems then think first in half of the cases."""
    if rng.random() >= CHAT:
        return plain(example)
    if family == "study":
        return study_chat(example)
    if family == "reasoning":
        return chat(example, thinking=rng.random() < 0.5, system=SYSTEM if rng.random() < 0.5 else "")
    return chat(example)
