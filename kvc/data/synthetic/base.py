"""Documents made of typed segments, and seeding that is the same on every machine."""

import hashlib
import random
from collections.abc import Callable
from typing import Literal, NamedTuple, TypeVar

Kind = Literal["context", "answer", "result"]
Split = Literal["train", "val", "test"]
T = TypeVar("T")


class Segment(NamedTuple):
    """A piece of a document.

    Attributes:
        text: The characters; segments are concatenated without anything in between.
        kind: `"answer"` is what the model must produce, `"result"` the numbers in it that must be computed or copied
            (training weighs them more), `"context"` the rest.
    """

    text: str
    kind: Kind


Document = list[Segment]


def document_text(document: Document) -> str:
    """The whole text of a document."""
    return "".join(segment.text for segment in document)


def rng_for(task: str, split: str, seed: int, index: int) -> random.Random:
    """A generator for one item that depends on nothing but its four keys.

    Args:
        task: Name of the generator, such as `"reasoning"`.
        split: `"train"`, `"val"` or `"test"`.
        seed: The seed of the run.
        index: Number of the item within its split.
    """
    key = f"{task}/{split}/{seed}/{index}"
    return random.Random(int.from_bytes(hashlib.sha256(key.encode()).digest(), "big"))


def split_of(text: str) -> Split:
    """The split that owns a problem text: 8 of 10 belong to train, 1 to val, 1 to test.

    Ownership by content makes the splits disjoint for certain, whatever the seeds are.
    """
    bucket = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % 10
    if bucket < 8:
        return "train"
    return "val" if bucket == 8 else "test"


def sample_in_split(
    rng: random.Random, split: str, sample: Callable[[random.Random], T], text: Callable[[T], str]
) -> T:
    """Draw until the item belongs to the split.

    Args:
        rng: Source of randomness, advanced by every attempt.
        split: The split that must own the item.
        sample: Draws one item.
        text: The text of an item that decides who owns it (its question or passage).
    """
    while True:
        item = sample(rng)
        if split_of(text(item)) == split:
            return item
