"""A question as a decoding evaluation sees it, wherever it comes from."""

from typing import NamedTuple, Protocol


class Judged(NamedTuple):
    """What a completion answered.

    Attributes:
        answer: The extracted answer; None where nothing could be extracted.
        correct: Whether it is right.
    """

    answer: str | None
    correct: bool


class Question(Protocol):
    """A prompt, and a judge of what follows it."""

    @property
    def id(self) -> int:
        """Its number in the split."""
        ...

    @property
    def group(self) -> str:
        """What it is reported under, such as `reasoning 9-16`."""
        ...

    @property
    def prompt(self) -> str:
        """Everything before the answer, without BOS."""
        ...

    @property
    def bare_prompt(self) -> str | None:
        """The prompt without the context that the answer needs; None where they cannot be told apart."""
        ...

    @property
    def gold(self) -> str:
        """The right answer."""
        ...

    def judge(self, completion: str) -> Judged:
        """Grade a completion."""
        ...
