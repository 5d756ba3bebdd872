"""What every annotator does, and where the gold reasoning comes from."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

from kvc.data.answers import final_answer, normalize_number
from kvc.data.traces import HUB, Trace, hub_records, read_records, strip_markers
from kvc.errors import UserError


class Gold(NamedTuple):
    """A problem with its gold solution (without markers, calculator annotations kept) and final answer."""

    question: str
    answer: str
    reasoning: str
    source: str


class Annotator(Protocol):
    """Puts markers into a solution: `RulesAnnotator` into the gold one, `OpenAIAnnotator` into a model's own."""

    name: str

    def annotate(self, question: str, answer: str, reasoning: str) -> Trace:
        """A trace for one problem.

        Args:
            question: The problem.
            answer: The gold answer, such as `72`.
            reasoning: The gold solution without markers.
        """
        ...


def _gold(where: str, row: dict[str, object], source: str) -> Gold:
    """The gold solution in a trace record or in a GSM8K row, whose `answer` holds solution and `#### N`."""

    def text(key: str) -> str:
        value = row.get(key)
        if value is None:
            raise UserError(f"{where}: key {key!r} is missing")
        if isinstance(value, int | float) and not isinstance(value, bool):
            value = str(value)
        if not isinstance(value, str) or not value.strip():
            raise UserError(f"{where}: key {key!r} must be text that is not empty")
        return value

    question, answer = text("question"), text("answer")
    if "reasoning_with_compression" in row:
        reasoning = row.get("original_reasoning") or strip_markers(text("reasoning_with_compression"))[0]
        return Gold(question, answer, str(reasoning), str(row.get("source") or source))
    final = final_answer(answer)
    number = None if final is None else normalize_number(final)
    if number is None:
        raise UserError(f"{where}: key 'answer' has no final line '#### N', as a GSM8K row must")
    return Gold(question, number, re.sub(r"\r\n?", "\n", answer), source)


def read_gold(source: str, split: str = "train") -> Iterator[Gold]:
    """Gold solutions from a local file or, as `hub:owner/name`, from the Hub.

    Rows are either traces (their `original_reasoning`, or their text without markers, is used) or in the layout of
    GSM8K (`question`, and an `answer` that ends in `#### N`).

    Raises:
        UserError: The source is missing, empty or malformed.
    """
    on_hub = source.startswith(HUB)
    rows = hub_records(source.removeprefix(HUB), split) if on_hub else read_records(Path(source))
    name = source if on_hub else Path(source).name
    for where, row in rows:
        yield _gold(where, row, name)
