"""From a list of steps to the text of a solution with `<COMP>` markers.

A marker ends a phase: it follows a bound result ("so Emma has 25 buttons.") or a start fact ("Karl starts with 30
buttons.") unless the very next calculation starts from that number, which is then still needed word for word. The
question tells which number that is, so a marker is decided by the text on its left, but only for a reader who knows
what comes next. Sentences that finish nothing get none: a restatement that the calculation still follows, a reminder
("Keep in mind: ..."), a plan ("Next we look at Emma."). A full stop, like a line break, is evidence and not proof.
"""

import random
import re
from typing import NamedTuple

from kvc.data.synthetic.base import Segment

COMP = "<COMP>"
NEW_LINE = 0.5  # chance of a line break between two sentences; otherwise they share the line
RESTATED_START = 0.7
REMINDER = 0.35  # chance of a reminder before a step when a number of an older step is still needed
PLAN = 0.2

# {s}: statement, {e}: equation, {b}: bound result. One finished calculation each.
SHAPES = (
    "{s}: {e}, so {b}.",
    "{s}: {e}, so {b}.",
    "{s}:\n{e}, so {b}.",
    "{s}:\n{e},\nso {b}.",
    "{s}. This gives {e}, so {b}.",
    "{s}.\nThis gives\n{e}, so {b}.",
)


class Step(NamedTuple):
    """One calculation.

    Attributes:
        statement: What happens, without its full stop.
        equation: Such as `30 - 5 = 25`.
        bound: The result next to its owner, such as `Emma has 25 buttons`.
        uses: The people whose numbers go in.
        owner: Whose number comes out; empty for a total.
        value: The number that comes out.
    """

    statement: str
    equation: str
    bound: str
    uses: tuple[str, ...]
    owner: str
    value: int


def _reminder(rng: random.Random, values: dict[str, int], steps: list[Step], done: int, objects: str) -> str:
    """A line that keeps a number which a later step starts from, or nothing if no later step needs one."""
    needed: list[str] = []
    changed: set[str] = set()
    for step in steps[done:]:
        needed += [
            person for person in step.uses if person in values and person not in changed and person not in needed
        ]
        changed.add(step.owner)
    if not needed:
        return ""
    person = rng.choice(needed)
    return f"Keep in mind: {person} has {values[person]} {objects}."


def write_solution(rng: random.Random, starts: dict[str, int], steps: list[Step], objects: str, answer: str) -> str:
    r"""The solution text, with ` <COMP>` after each finished phase and none after the last line.

    Args:
        rng: Source of randomness for the layout; it changes no number.
        starts: What each person starts with.
        steps: The calculations in order.
        objects: What is counted.
        answer: The final number; the text ends in `\n#### {answer}`.
    """
    values = dict(starts)
    needed = [set(step.uses) for step in steps] + [set()]
    sentences = [
        f"{person} starts with {value} {objects}." + ("" if person in needed[0] else f" {COMP}")
        for person, value in starts.items()
        if rng.random() < RESTATED_START
    ]
    for done, step in enumerate(steps):
        if rng.random() < REMINDER and (reminder := _reminder(rng, values, steps, done, objects)):
            sentences.append(reminder)
        if step.owner and rng.random() < PLAN:
            sentences.append(f"Next we look at {step.owner}.")
        sentence = rng.choice(SHAPES).format(s=step.statement, e=step.equation, b=step.bound)
        sentences.append(sentence if step.owner in needed[done + 1] else f"{sentence} {COMP}")
        if step.owner:
            values[step.owner] = step.value
    text = sentences[0]
    for sentence in sentences[1:]:
        text += ("\n" if rng.random() < NEW_LINE else " ") + sentence
    return f"{text}\n#### {answer}"


def numbers_as_results(text: str) -> list[Segment]:
    """Split solution text into answer segments and the numbers in it, each with the space before it."""
    pieces = re.split(r"( ?\d+)", text)
    kinds = ("answer", "result")
    return [Segment(piece, kinds[i % 2]) for i, piece in enumerate(pieces) if piece]  # type: ignore[arg-type]
