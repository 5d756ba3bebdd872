"""What is written after each document: nothing, takeaways, one note that is rewritten, or one that grows.

The request to write is read by a copy of the memory that is thrown away, so the memory holds each document and each
summary once, and no request.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

ModeName = Literal["none", "takeaways", "notepad", "append"]
Complexity = Literal["simple", "complex"]
POINTS: dict[Complexity, int] = {"simple": 3, "complex": 5}
SHAPES: dict[Complexity, str] = {
    "simple": "{points} short bullet points",
    "complex": "{points} bullet points of three to five sentences each, with the formulas that matter",
}


@dataclass(frozen=True)
class Request:
    """What the model reads before it writes.

    Attributes:
        text: The request, up to the number that begins the list.
        first: Number of the first point.
    """

    text: str
    first: int


class Mode(ABC):
    """What is written after each document.

    Args:
        complexity: How long.
    """

    header = ""
    """Stands before what is written; empty where nothing is."""

    def __init__(self, complexity: Complexity = "complex") -> None:
        self.complexity: Complexity = complexity

    @property
    def points(self) -> int:
        """Points in one go."""
        return POINTS[self.complexity]

    @abstractmethod
    def request(self, written: Sequence[str]) -> Request | None:
        """What the model is asked after a document; None for nothing.

        Args:
            written: What it wrote after the documents before.
        """

    def note(self, written: Sequence[str]) -> str:
        """What is known at the end, as plain text."""
        return "\n".join(written)

    def _ask(self, text: str, first: int = 1) -> Request:
        shape = SHAPES[self.complexity].format(points=self.points)
        return Request(f"({text.format(shape=shape)} I end the list with a line '---'.)\n\n{first}.", first)


class Nothing(Mode):
    """Only the documents are read."""

    def request(self, written: Sequence[str]) -> Request | None:
        """Never."""
        return None


class Takeaways(Mode):
    """A list of its own for every document."""

    header = "###Takeaways:\n"

    def request(self, written: Sequence[str]) -> Request:
        """A list that begins anew."""
        return self._ask("Now I write down what I take away from this for solving other problems, as {shape}.")


class Notepad(Mode):
    """One note, which is rewritten after every document."""

    header = "###Note:\n"

    @property
    def points(self) -> int:
        """A note has five points, however long they are."""
        return 5

    def request(self, written: Sequence[str]) -> Request:
        """The note so far, to be rewritten."""
        if not written:
            return self._ask("Now I write a note about the category of this problem and strategies for it, as {shape}.")
        # The old note is put in afterwards: braces in it are text.
        asked = self._ask(
            "Now I rewrite my note so that it covers this and all earlier problems, with categories and strategies, "
            "as {shape}."
        )
        return Request(f"###Previous Note:\n{written[-1]}\n\n{asked.text}", asked.first)

    def note(self, written: Sequence[str]) -> str:
        """The last version."""
        return written[-1] if written else ""


class Append(Mode):
    """One note, to which every document adds points."""

    header = "###Note:\n"

    def request(self, written: Sequence[str]) -> Request:
        """New points, whose numbers go on."""
        first = self.points * len(written) + 1
        return self._ask("Now I add to my note what is new here, as {shape}, and go on with their numbers.", first)


MODES: dict[ModeName, type[Mode]] = {"none": Nothing, "takeaways": Takeaways, "notepad": Notepad, "append": Append}
