"""The tasks: names, difficulties, how an item is drawn and how an answer is graded."""

import random
from collections.abc import Callable
from typing import NamedTuple

from kvc.data.answers import extract_answer, same_answer
from kvc.data.synthetic.base import rng_for, sample_in_split
from kvc.data.synthetic.dialogue import sample_dialogue
from kvc.data.synthetic.documents import sample_document
from kvc.data.synthetic.example import Example
from kvc.data.synthetic.in_context import sample_in_context
from kvc.data.synthetic.passages import passage_example, sample_passage
from kvc.data.synthetic.personalisation import sample_history
from kvc.data.synthetic.reasoning import problem_example, problem_for, sample_problem
from kvc.data.synthetic.study import sample_study

Range = tuple[int, int]


class Level(NamedTuple):
    """A difficulty: its name and the smallest and largest size (steps, facts, tokens ...) of its items."""

    name: str
    size: Range


class Task(NamedTuple):
    """A family of items.

    Attributes:
        name: Such as `passages`.
        unit: What the sizes of its levels count.
        levels: From easy to hard.
        draw: Draws an item of a size; `Level` tells variants apart by name.
        grade: Whether a completion of the prompt is right; None where many are (a dialogue goes on freely), so that
            only the likelihood of the gold answer tells.
    """

    name: str
    unit: str
    levels: tuple[Level, ...]
    draw: Callable[[random.Random, Level], Example]
    grade: Callable[[str, Example], bool] | None


def final_number(completion: str, example: Example) -> bool:
    """The number after the last `####`, compared as a number."""
    answer = extract_answer(completion)
    return answer is not None and same_answer(answer, example.gold)


def first_line(completion: str, example: Example) -> bool:
    """The first line without the blanks around it and without a final full stop."""
    line = completion.strip().split("\n")[0].strip()
    return line.removesuffix(".") == example.gold.removesuffix(".")


def first_word(completion: str, example: Example) -> bool:
    """The first word, for answers within a sentence."""
    return completion.replace(".", " ").split()[:1] == [example.gold]


def _levels(*sizes: Range) -> tuple[Level, ...]:
    return tuple(Level(str(low) if low == high else f"{low}-{high}", (low, high)) for low, high in sizes)


def _passage(rng: random.Random, level: Level) -> Example:
    share = 1.0 if level.name == "unanswerable" else 0.0
    return passage_example(sample_passage(rng, level.size, (1, 1), share), rng)


TASKS = {
    task.name: task
    for task in (
        Task(
            "reasoning",
            "steps",
            _levels((2, 4), (5, 8), (9, 16)),
            lambda rng, level: problem_example(sample_problem(rng, level.size)),
            final_number,
        ),
        Task(
            "passages",
            "facts",
            (*_levels((4, 8), (9, 16), (17, 30)), Level("unanswerable", (4, 30))),
            _passage,
            first_line,
        ),
        Task(
            "documents",
            "tokens",
            _levels((512, 1024), (1025, 2048), (2049, 4000)),
            lambda rng, level: sample_document(rng, level.size),
            first_word,
        ),
        Task(
            "in_context",
            "demonstrations",
            _levels((1, 2), (4, 4), (8, 8), (16, 16)),
            lambda rng, level: sample_in_context(rng, level.size),
            first_line,
        ),
        Task(
            "dialogue",
            "turns",
            _levels((2, 4), (5, 8), (9, 12)),
            lambda rng, level: sample_dialogue(rng, level.size),
            None,
        ),
        Task(
            "personalisation",
            "notes",
            _levels((4, 8), (9, 16), (17, 32)),
            lambda rng, level: sample_history(rng, level.size),
            first_line,
        ),
        Task(
            "study",
            "documents",
            _levels((2, 3), (4, 6)),
            lambda rng, level: sample_study(rng, level.size, questions=(1, 1)),
            first_line,
        ),
    )
}


def example(task: str, split: str, seed: int, index: int, level: str) -> Example:
    """Item `index` of a task; the same keys give the same bytes on every machine.

    Args:
        task: A name in `TASKS`.
        split: `"train"`, `"val"` or `"test"`; no context of one split occurs in another.
        seed: The seed of the run.
        index: Number of the item.
        level: Name of a difficulty of the task, such as `"9-16"`.

    Raises:
        KeyError: The task or the level does not exist.
    """
    kind = TASKS[task]
    chosen = next((known for known in kind.levels if known.name == level), None)
    if chosen is None:
        raise KeyError(f"task {task} has the levels {', '.join(known.name for known in kind.levels)}, not {level!r}")
    if task == "reasoning":  # shares its items with the traces that carry markers
        return problem_example(problem_for(split, seed, index, chosen.size))
    rng = rng_for(f"{task} {level}", split, seed, index)
    return sample_in_split(rng, split, lambda r: kind.draw(r, chosen), lambda item: item.material)
