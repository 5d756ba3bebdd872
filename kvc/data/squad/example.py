"""One question about one context."""

from typing import NamedTuple

from kvc.core.files import digest


class SquadExample(NamedTuple):
    """A question as SQuAD has it.

    Attributes:
        key: Its id in the source.
        context: The passage.
        question: The question.
        answers: All gold answers; a single empty one if the passage does not answer it.
        starts: Character in the context where each answer begins; -1 for the empty one.
    """

    key: str
    context: str
    question: str
    answers: tuple[str, ...]
    starts: tuple[int, ...]

    @property
    def answerable(self) -> bool:
        """Whether the passage answers it."""
        return self.answers != ("",)

    @property
    def group(self) -> int:
        """A number of the context, 60 bits of its hash: questions about one context share it."""
        return int(digest(self.context)[:15], 16)


def unanswerable(key: str, context: str, question: str) -> SquadExample:
    """A question that the context does not answer: its gold answer is the empty text."""
    return SquadExample(key, context, question, ("",), (-1,))
