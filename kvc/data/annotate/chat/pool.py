"""The questions that may be asked, each once, in an order that depends on the seed and not on the file."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from kvc.core.files import digest
from kvc.data.annotate.base import Gold
from kvc.data.answers import normalize_number


class Item(NamedTuple):
    """A question under its key."""

    key: str
    gold: Gold


@dataclass(frozen=True)
class Pool:
    """Everything that can be drawn from.

    Attributes:
        items: In the order of drawing.
        identity: Names questions and answers, whatever their order.
        repeated: Questions that occurred before and were left out.
        unusable: Questions whose gold answer is no number, so that no reply could be checked.
    """

    items: tuple[Item, ...]
    identity: str
    repeated: int = 0
    unusable: int = 0


def key_of(question: str) -> str:
    """16 hexadecimal digits that depend on the question alone."""
    return digest(question.strip())


def make_pool(golds: Iterable[Gold], seed: int) -> Pool:
    """Draw-order of the questions.

    The place of a question is a hash of it and the seed: adding questions to a file moves no other past another.

    Args:
        golds: Problems with gold answers.
        seed: Seed of the order.
    """
    items: dict[str, Item] = {}
    repeated = unusable = 0
    for gold in golds:
        key = key_of(gold.question)
        if normalize_number(gold.answer) is None:
            unusable += 1
        elif key in items:
            repeated += 1
        else:
            items[key] = Item(key, gold)
    identity = digest(sorted((key, item.gold.answer) for key, item in items.items()))
    ordered = sorted(items.values(), key=lambda item: digest([seed, item.key]))
    return Pool(tuple(ordered), identity, repeated, unusable)
