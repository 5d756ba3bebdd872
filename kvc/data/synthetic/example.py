"""One item of a task: a context in chunks, a query about it, the answer; and its layouts as text."""

from typing import NamedTuple

from kvc.data.synthetic.base import Document, Segment, document_text

EOS = "<|eos|>"
THINK, END_THINK = "<think>", "</think>"


class Turn(NamedTuple):
    """A question about the context and what must be produced.

    Attributes:
        query: Follows the context and is never compressed; begins with its own separator.
        lead: Announces the answer, such as a line break and `Answer:`.
        answer: The answer as segments, including the space before it.
    """

    query: str
    lead: str
    answer: tuple[Segment, ...]


class Lifetime(NamedTuple):
    """Characters `start..end` of the plain layout are needed until character `until` is written."""

    start: int
    end: int
    until: int


class Example(NamedTuple):
    """One item of a task.

    Attributes:
        head: Opens the plain layout, such as `Passage: `.
        chunks: The context, one document per time step (a sentence, a demonstration, a turn ...); what may be
            compressed. Segments of kind `answer` in it can be predicted from earlier chunks.
        turns: Questions about the context; held-out items have one.
        gold: The answer that is graded, without layout.
        choices: The possible answers in the order they are shown; empty when they are not shown.
        shortcut: What a known shortcut answers without reading properly, empty where it leads nowhere; None where no
            shortcut is known.
        lifetimes: How long the parts of the text are needed; empty where nobody has worked it out.
        steps: Where each calculation of the plain layout is complete, in characters; empty where there are none.
    """

    head: str
    chunks: tuple[tuple[Segment, ...], ...]
    turns: tuple[Turn, ...]
    gold: str
    choices: tuple[str, ...] = ()
    shortcut: str | None = None
    lifetimes: tuple[Lifetime, ...] = ()
    steps: tuple[int, ...] = ()

    @property
    def context(self) -> str:
        """The text that may be compressed, with its head."""
        return self.head + self.material

    @property
    def material(self) -> str:
        """The context without its head: what decides which split owns the item."""
        return "".join(document_text(list(chunk)) for chunk in self.chunks)

    @property
    def prompt(self) -> str:
        """The plain layout up to the first character of the first answer."""
        return self.context + self.turns[0].query + self.turns[0].lead


def text_chunks(*texts: str) -> tuple[tuple[Segment, ...], ...]:
    """Chunks of plain context, one per text."""
    return tuple((Segment(text, "context"),) for text in texts)


def plain(example: Example) -> Document:
    """The plain layout: head, chunks, then every turn."""
    document = [Segment(example.head, "context")] if example.head else []
    document += [segment for chunk in example.chunks for segment in chunk]
    for turn in example.turns:
        document += [Segment(turn.query + turn.lead, "context"), *turn.answer]
    return document


def user(text: str) -> Segment:
    """A user's message and the opening of the reply, as the chat template of the tiny model writes them."""
    return Segment(f"User: {text.strip()}\nAssistant:\n", "context")


def reply(turn: Turn, thinking: bool = False) -> Document:
    """The assistant's message: the last line of the lead, the answer, the end-of-text token.

    With `thinking`, all lines of the answer but the last stand between `<think>` and `</think>`.
    """
    lead = turn.lead.rsplit("\n", 1)[-1]
    answer = list(turn.answer)
    if thinking:
        last = max(i for i, segment in enumerate(answer) if "\n" in segment.text)
        before, after = answer[last].text.rsplit("\n", 1)
        cut = [Segment(f"{before}\n{END_THINK}\n{after}", "answer")]
        answer = [Segment(f"{THINK}\n", "answer"), *answer[:last], *cut, *answer[last + 1 :]]
    end = [Segment(f"{EOS}\n", "answer")]
    return ([Segment(lead, "answer")] if lead else []) + answer + end


def chat(example: Example, thinking: bool = False, system: str = "") -> Document:
    """The same item as a conversation: the context and the first query are the first user message."""
    opening: Document = [Segment(f"{system}\n", "context")] if system else []
    chunks = [segment for chunk in example.chunks for segment in chunk]
    document = [*opening, Segment("User: ", "context"), *chunks]
    for number, turn in enumerate(example.turns):
        if number == 0:
            document.append(Segment(f"{turn.query}\nAssistant:\n", "context"))
        else:
            document.append(user(turn.query))
        document += reply(turn, thinking)
    return document
