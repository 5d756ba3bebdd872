r"""Short documents: one part tells facts among other sentences, the other part reminds of them.

How many facts there are differs from document to document, so one of them has more to remember than another.

Example (64 tokens, half of them told):

    Emma lives in Paris. Nina looked at the clock. The age of Karl is 34. On Friday it was dry and hot. Remember that
    the age of Karl is 34. Remember that Emma lives in Paris. Oscar looked at the map.
"""

import random

from kvc.data.synthetic.base import Document, Segment
from kvc.data.synthetic.documents import Fact, count_tokens, draw_facts, filler, reminder


def sample_short_document(rng: random.Random, tokens: int, density: float | None = None) -> Document:
    """Draw a document.

    Args:
        rng: Source of randomness.
        tokens: Tokens of the whole document, at least; half of them tell, as far as whole sentences go.
        density: Share of the telling sentences that are facts; the first one always is. None draws it.
    """
    density = rng.random() if density is None else density
    fresh: list[Fact] = draw_facts(rng)
    told: list[Fact] = []
    document: Document = []
    room = tokens // 2
    while True:
        fact = fresh[-1] if fresh and (not told or rng.random() < density) else None
        text = "".join(fact) if fact else filler(rng)
        room -= count_tokens(text)
        # One token is left for BOS.
        if room < 1 and told:
            break
        if fact:
            told.append(fresh.pop())
        document.append(Segment(f"{' ' if document else ''}{text}", "context"))
    written = sum(count_tokens(segment.text) for segment in document)
    order = rng.sample(told, len(told))
    while written < tokens:
        added = reminder(order.pop()) if order else [Segment(f" {filler(rng)}", "context")]
        document += added
        written += sum(count_tokens(segment.text) for segment in added)
    return document
