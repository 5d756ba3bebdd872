"""Helper tasks that teach recall and single equations quickly: every answer token of them is dense signal."""

import random

from kvc.data.synthetic.base import Document, Segment
from kvc.data.synthetic.vocabulary import ALL_WORDS, LABELS, LOOKUP_VALUES, NAMES, TAGS, TOPICS

LINKS = ("", ":", " is", " has", " has the", " likes")


def repeat(rng: random.Random, words: tuple[int, int] = (4, 24)) -> Document:
    """Random words, then the same words again once or twice."""
    line = "".join(f" {rng.choice(ALL_WORDS)}" for _ in range(rng.randint(*words))) + " ;"
    return [Segment(f"Repeat:{line}", "context")] + [Segment(line, "answer")] * rng.randint(1, 2)


def lookup(rng: random.Random, pairs: tuple[int, int] = (4, 16), queries: tuple[int, int] = (3, 10)) -> Document:
    """A key-value list, then keys whose values must be recalled; values are words of one kind or numbers."""
    kind = rng.randrange(len(LOOKUP_VALUES) + 2)  # numbers twice as often as any kind of word
    values = LOOKUP_VALUES[kind] if kind < len(LOOKUP_VALUES) else [str(number) for number in range(100)]
    link = rng.choice(LINKS)
    table = {key: rng.choice(values) for key in rng.sample(NAMES, rng.randint(*pairs))}
    document = [Segment("List:" + "".join(f" {key}{link} {value};" for key, value in table.items()), "context")]
    for _ in range(rng.randint(*queries)):
        key = rng.choice(list(table))
        document += [Segment(f" {key}{link}", "context"), Segment(f" {table[key]}", "answer"), Segment(";", "context")]
    return document


def sort(rng: random.Random, words: tuple[int, int] = (8, 32), kinds: tuple[int, int] = (2, 6)) -> Document:
    """Words of a few kinds, each followed by the label that its kind has in this list; words may come again."""
    chosen = rng.sample(TOPICS, rng.randint(*kinds))
    labels = rng.sample(rng.choice((LABELS, TAGS)), len(chosen))
    pools = [rng.sample(kind, rng.randint(2, len(kind))) for kind in chosen]
    document, seen = [Segment("Sort:", "context")], set()
    for _ in range(rng.randint(*words)):
        kind = rng.randrange(len(chosen))
        label = Segment(f" {labels[kind]}", "answer" if kind in seen else "context")
        document += [Segment(f" {rng.choice(pools[kind])}:", "context"), label, Segment(";", "context")]
        seen.add(kind)
    return document


def equation(rng: random.Random) -> tuple[str, int]:
    """One equation as its left side and its result, both within 0..99."""
    while True:
        left, right = rng.randint(1, 99), rng.randint(2, 9)
        operation = rng.choice("++--*/s")
        if operation == "s":  # a total of two people: any second number
            operation, right = "+", rng.randint(1, 99)
        elif operation == "*":
            right = rng.choice((2, 3))
        elif operation == "/":
            right = 2
            if left % 2:
                continue
        result = {"+": left + right, "-": left - right, "*": left * right, "/": left // right}[operation]
        if 1 <= result <= 99:
            return f"{left} {operation} {right} =", result


def drill(rng: random.Random, equations: tuple[int, int] = (4, 14)) -> Document:
    """A row of unrelated equations."""
    document = [Segment("Drill:", "context")]
    for _ in range(rng.randint(*equations)):
        left, result = equation(rng)
        document += [Segment(f" {left}", "context"), Segment(f" {result}", "result"), Segment(";", "context")]
    return document
