"""Questions as tokens: head, context, tail and answer apart, and where in the context the answer stands."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from kvc.data.squad.example import SquadExample
from kvc.data.squad.template import Rendered, SquadTemplate, render


class Encoded(NamedTuple):
    """One question as tokens.

    Attributes:
        head: Before the context, with BOS.
        context: The context.
        tail: After the context.
        answer: The first gold answer and EOS.
        spans: First token and the one after the last of each gold answer in the context; none if there is none.
        rendered: The prompt as text.
    """

    head: list[int]
    context: list[int]
    tail: list[int]
    answer: list[int]
    spans: tuple[tuple[int, int], ...]
    rendered: Rendered


def encode(examples: Sequence[SquadExample], tokenizer: Any, template: SquadTemplate, no_answer: str) -> list[Encoded]:
    """Tokenise examples, each context once.

    Args:
        examples: Questions.
        tokenizer: A fast tokenizer (offsets are needed).
        template: How they are presented.
        no_answer: What the model is to say where the context gives no answer.
    """
    contexts = list(dict.fromkeys(example.context for example in examples))
    # The blank belongs to the context: a first word with it is the token that a model knows from running text.
    texts = [f" {context}" for context in contexts]
    read = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True) if texts else {}
    by_context = {
        context: (ids, offsets)
        for context, ids, offsets in zip(contexts, read.get("input_ids", []), read.get("offset_mapping", []))
    }

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    bos = [] if template.chat or tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    blank = "" if template.chat else " "
    found = []
    for example in examples:
        context, offsets = by_context[example.context]
        rendered = render(template, example.question, tokenizer)
        gold = example.answers[0] if example.answerable else no_answer
        answer = [*ids(f"{blank}{gold}"), tokenizer.eos_token_id]
        spans = _spans(example, offsets)
        found.append(Encoded([*bos, *ids(rendered.head)], context, ids(rendered.tail), answer, spans, rendered))
    return found


def _spans(example: SquadExample, offsets: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """The tokens that share a character with each answer; offsets are those of the context after a blank."""
    if not example.answerable:
        return ()
    first, last = (torch.tensor(list(side)) for side in zip(*offsets))
    spans = []
    for text, start in zip(example.answers, example.starts):
        if start < 0:  # an answer that is no part of the context, such as "yes"
            continue
        inside = ((last > start + 1) & (first < start + 1 + len(text))).nonzero()[:, 0]
        if len(inside):  # tokenizers that rewrite characters may have no token for it
            spans.append((int(inside[0]), int(inside[-1]) + 1))
    return tuple(spans)


def window(encoded: Encoded, size: int, generator: torch.Generator) -> Encoded:
    """A random stretch of a long context that holds the first answer whole; a short context stays.

    Args:
        encoded: A question; its first span must fit.
        size: Tokens of the stretch.
        generator: Source of randomness.
    """
    total = len(encoded.context)
    if total <= size:
        return encoded
    first, last = encoded.spans[0] if encoded.spans else (total, 0)
    lowest, highest = max(0, last - size), min(first, total - size)
    start = lowest + int(torch.randint(highest - lowest + 1, (), generator=generator))
    return cut(encoded, start, start + size)


def cut(encoded: Encoded, start: int, stop: int) -> Encoded:
    """The question with a part of its context; of the answers, those that it holds whole."""
    kept = tuple((a - start, b - start) for a, b in encoded.spans if start <= a and b <= stop)
    return encoded._replace(context=encoded.context[start:stop], spans=kept)


def whole_prompt(encoded: Encoded, bos: int | None) -> Encoded:
    """The question with all of the prompt as the context to compress, and only BOS before it.

    A chat template that writes no BOS leaves nothing before it.
    """
    starts = bool(encoded.head) and encoded.head[0] == bos
    head, rest = (encoded.head[:1], encoded.head[1:]) if starts else ([], encoded.head)
    spans = tuple((a + len(rest), b + len(rest)) for a, b in encoded.spans)
    return encoded._replace(head=head, context=[*rest, *encoded.context, *encoded.tail], tail=[], spans=spans)
