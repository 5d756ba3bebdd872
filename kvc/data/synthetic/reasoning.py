r"""Word problems whose solutions restate, compute and bind a result at every step.

The layout of a solution is random, so that a line break says little about where a step ends: several steps may share
a line, one step may span three lines, and some finished sentences (a restatement, a reminder, a plan) end no step.
`layout.py` holds that part; here are the people, their numbers and the questions. A step starts from the number of a
person chosen uniformly, so results from far back are used again.

Examples (the first is shown whole, markers included; of the others the questions):

    Question: Frank starts with 23 buttons. Leo got 3 times as many buttons as Frank. Leo loses 4 buttons. How many
    buttons does Leo have at the end?
    Solution:
    Leo got 3 times as many buttons as Frank: 23 * 3 = 69, so Leo has 69 buttons. Leo loses 4 buttons:
    69 - 4 = 65,
    so Leo has 65 buttons. <COMP>
    #### 65

    Question: Ida starts with 8 coins. Ben starts with 30 coins. Ida finds 5 coins. How many coins does Ben have at
    the end?

    Question: Nina starts with 23 pens. Laura got 9 fewer pens than Nina. Nina finds 6 pens. How many pens do Laura
    and Nina have together?
"""

import random
from dataclasses import dataclass, field
from functools import partial

from kvc.data.prompts import render_prompt
from kvc.data.synthetic.base import rng_for, sample_in_split
from kvc.data.synthetic.example import Example, Lifetime, Turn, text_chunks
from kvc.data.synthetic.layout import COMP, Step, numbers_as_results, write_solution
from kvc.data.synthetic.vocabulary import NAMES, OBJECTS

LARGEST = 99  # numbers up to here are one token
FIRST_VALUES = (5, 60)
OPERANDS = (2, 9)
MAX_PEOPLE = 5
SECOND_FACT = 0.8  # share of problems with two start facts
NEW_PERSON = 0.45  # share of steps that bring in another person while there is one
TOTAL_AT_END = 0.35


@dataclass(frozen=True)
class Problem:
    """One word problem and its solution.

    Attributes:
        question: All statements and the question, as one line of text.
        statements: The sentences that give the facts, in order.
        reasoning_with_compression: The solution with a literal `<COMP>` after each finished phase.
        original_reasoning: The same solution without markers.
        answer: Digits.
        steps: Number of calculations.
        starts: What each person starts with, in the order of the question.
        plan: The calculations.
    """

    question: str
    statements: tuple[str, ...]
    reasoning_with_compression: str
    original_reasoning: str
    answer: str
    steps: int
    starts: dict[str, int] = field(repr=False)
    plan: tuple[Step, ...] = field(repr=False)


def _operations(value: int, operand: int) -> list[str]:
    """The operations that keep the value within 1..99; addition and subtraction are twice as likely."""
    allowed = []
    if value + operand <= LARGEST:
        allowed += ["+", "+"]
    if value - operand >= 1:
        allowed += ["-", "-"]
    allowed += [f"*{factor}" for factor in (2, 3) if value * factor <= LARGEST]
    if value % 2 == 0 and value >= 4:
        allowed.append("/2")
    return allowed


def _apply(operation: str, value: int, operand: int) -> tuple[int, str]:
    """The new value, and the left side of its equation."""
    if operation == "+":
        return value + operand, f"{value} + {operand}"
    if operation == "-":
        return value - operand, f"{value} - {operand}"
    if operation == "/2":
        return value // 2, f"{value} / 2"
    factor = int(operation[1])
    return value * factor, f"{value} * {factor}"


# {o}: objects, {k}: operand, {a}: who changes or is new, {b}: who is compared with.
COMPARISONS = {
    "+": ("{a} got {k} more {o} than {b}", "{a} has {k} {o} more than {b}"),
    "-": ("{a} got {k} fewer {o} than {b}", "{a} has {k} {o} less than {b}"),
    "*2": ("{a} got twice as many {o} as {b}",),
    "*3": ("{a} got 3 times as many {o} as {b}",),
    "/2": ("{a} got half as many {o} as {b}",),
}
CHANGES = {
    "+": ("{a} buys {k} more {o}", "{a} finds {k} {o}", "Then {a} gets {k} {o} from a friend"),
    "-": ("{a} gives away {k} {o}", "{a} loses {k} {o}", "Then {a} sells {k} {o}"),
    "*2": ("Then {a} doubles the number of {o}",),
    "*3": ("Then {a} triples the number of {o}",),
    "/2": ("Then {a} loses half of the {o}",),
}


def _change(rng: random.Random, values: dict[str, int], waiting: list[str], objects: str) -> Step:
    """One step from the number of a person chosen uniformly; updates `values`, and `waiting` when somebody joins."""
    source = rng.choice(list(values))
    operand = rng.randint(*OPERANDS)
    operation = rng.choice(_operations(values[source], operand))
    result, left = _apply(operation, values[source], operand)
    joins = bool(waiting) and rng.random() < NEW_PERSON
    owner = waiting.pop(0) if joins else source
    phrase = rng.choice((COMPARISONS if joins else CHANGES)[operation])
    values[owner] = result
    statement = phrase.format(a=owner, b=source, k=operand, o=objects)
    return Step(statement, f"{left} = {result}", f"{owner} has {result} {objects}", (source,), owner, result)


def _total(values: dict[str, int], people: tuple[str, str], objects: str) -> Step:
    """The sum of what two people have."""
    a, b = people
    total = values[a] + values[b]
    statement = f"We add the {objects} of {a} and {b}"
    return Step(
        statement, f"{values[a]} + {values[b]} = {total}", f"together they have {total} {objects}", people, "", total
    )


def sample_problem(rng: random.Random, steps: tuple[int, int] = (2, 8)) -> Problem:
    """Draw one problem.

    The person whose number a step starts from is chosen uniformly, and so is the person the question asks about: the
    most recent number is a poor guess for either.

    Args:
        rng: Source of randomness.
        steps: Smallest and largest number of calculations (inclusive), at most 16, so that no solution has more than
            20 markers.
    """
    assert 1 <= steps[0] <= steps[1] <= 16, steps
    count = rng.randint(*steps)
    objects = rng.choice(OBJECTS)
    people = rng.sample(NAMES, rng.randint(2, MAX_PEOPLE))
    started = people[: 2 if rng.random() < SECOND_FACT else 1]
    waiting = people[len(started) :]
    values = {person: rng.randint(*FIRST_VALUES) for person in started}
    starts = dict(values)
    with_total = count > 1 and rng.random() < TOTAL_AT_END
    plan = [_change(rng, values, waiting, objects) for _ in range(count - 1)]
    pairs = [(a, b) for a in values for b in values if a != b and values[a] + values[b] <= LARGEST]
    if with_total and pairs:
        a, b = rng.choice(pairs)
        told = plan
        plan = [*plan, _total(values, (a, b), objects)]
        answer = plan[-1].value
        ask = f"How many {objects} do {a} and {b} have together?"
    else:
        told = plan = [*plan, _change(rng, values, waiting, objects)]
        person = rng.choice(list(values))
        answer = values[person]
        ask = f"How many {objects} does {person} have at the end?"
    statements = [f"{person} starts with {value} {objects}." for person, value in starts.items()]
    statements += [f"{step.statement}." for step in told]
    solution = write_solution(rng, starts, plan, objects, str(answer))
    return Problem(
        question=" ".join([*statements, ask]),
        statements=tuple(statements),
        reasoning_with_compression=solution,
        original_reasoning=solution.replace(f" {COMP}", ""),
        answer=str(answer),
        steps=len(plan),
        starts=starts,
        plan=tuple(plan),
    )


def problem_for(split: str, seed: int, index: int, steps: tuple[int, int] = (2, 8)) -> Problem:
    """Item `index` of a split; the statements of one split occur in no other."""
    draw = partial(sample_problem, steps=steps)
    rng = rng_for("reasoning", split, seed, index)
    return sample_in_split(rng, split, draw, lambda problem: " ".join(problem.statements))


HEAD, SOLUTION = "Question: ", "\nSolution:\n"


def problem_example(problem: Problem) -> Example:
    """The problem as an example: a statement per chunk, the question as query, the solution without markers.

    The shortcut starts every calculation from the most recent result; it is right when the whole chain is the same.
    """
    first, *others = problem.statements
    chunks = text_chunks(first, *(f" {statement}" for statement in others))
    ask = problem.question[sum(len(statement) + 1 for statement in problem.statements) :]
    turn = Turn(f" {ask}", SOLUTION, tuple(numbers_as_results(problem.original_reasoning)))
    recent = [list(problem.starts)[-1], *(step.owner for step in problem.plan)]
    same_chain = all(recent[i] in step.uses for i, step in enumerate(problem.plan))
    bound = _bindings(problem)
    return Example(
        HEAD,
        chunks,
        (turn,),
        problem.answer,
        shortcut=problem.answer if same_chain else "",
        lifetimes=_lifetimes(problem, bound),
        steps=tuple(stop for _, stop in bound),
    )


def _bindings(problem: Problem) -> list[tuple[int, int]]:
    """Where each calculation's result stands next to its owner in the plain layout, in characters."""
    before = render_prompt(problem.question)
    text, position = before + problem.original_reasoning, len(before)
    bound = []
    for step in problem.plan:
        position = text.index(step.equation, position) + len(step.equation)
        start = text.index(step.bound, position)
        position = start + len(step.bound)
        bound.append((start, position))
    return bound


def _lifetimes(problem: Problem, bound: list[tuple[int, int]]) -> tuple[Lifetime, ...]:
    """What a perfect memory keeps: statements that are still to come, everybody's current number, the question.

    A statement stays until the calculation after its own is done, since the one that follows is found through it.
    """
    end = len(render_prompt(problem.question)) + len(problem.original_reasoning)
    owners = [step.owner for step in problem.plan]

    def changed(person: str, after: int) -> int:
        """Where the number of a person is replaced by a later calculation than number `after`."""
        return next((bound[i][1] for i in range(after + 1, len(owners)) if owners[i] == person), end)

    lifetimes, position = [], len(HEAD)
    for number, statement in enumerate(problem.statements):
        calculation = number - len(problem.starts)
        if calculation < 0:
            until = max(changed(list(problem.starts)[number], -1), bound[0][1])
        else:
            until = bound[min(calculation + 1, len(bound) - 1)][1]
        lifetimes.append(Lifetime(position, position + len(statement) + 1, until))
        position += len(statement) + 1
    lifetimes.append(Lifetime(position, len(HEAD) + len(problem.question) + len(SOLUTION), end))
    for number, (start, stop) in enumerate(bound):
        lifetimes.append(Lifetime(start, stop, changed(owners[number], number) if owners[number] else end))
    return tuple(lifetimes)
