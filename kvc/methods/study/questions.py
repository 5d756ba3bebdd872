"""Questions to ask after a study, from a JSON list or JSONL file."""

from pathlib import Path
from typing import Any, NamedTuple

from kvc.data.answers import final_answer, last_boxed
from kvc.data.problems import ANSWER_KEYS, QUESTION_KEYS
from kvc.data.traces import read_records
from kvc.errors import UserError


class Asked(NamedTuple):
    """One question.

    Attributes:
        id: Its own `id`, or its number in the file, from 0.
        question: The question alone.
        answer: The right answer; None where it is not known.
    """

    id: int | str
    question: str
    answer: str | None


def read_questions(path: str | Path, limit: int | None = None) -> list[Asked]:
    """The questions of a file: `question` or `problem`, and the final answer in `answer` or `solution` if it is known.

    Args:
        path: JSON list or JSONL.
        limit: Only the first so many; None takes all.

    Raises:
        UserError: The file is missing, empty or malformed, a question is missing (the line is named), or an id is
            there twice.
    """
    asked = [_asked(number, where, row) for number, (where, row) in enumerate(read_records(Path(path)))][:limit]
    seen: set[int | str] = set()
    for question in asked:
        if question.id in seen:
            raise UserError(f"{path}: the id {question.id!r} is there twice")
        seen.add(question.id)
    return asked


def _asked(number: int, where: str, row: dict[str, Any]) -> Asked:
    question = next((row[key] for key in QUESTION_KEYS if row.get(key)), None)
    if not isinstance(question, str) or not question.strip():
        raise UserError(f"{where}: has none of the keys {', '.join(QUESTION_KEYS)}")
    name = row.get("id", number)
    if isinstance(name, bool) or not isinstance(name, int | str):
        raise UserError(f"{where}: key 'id' must be a number or text, got {type(name).__name__}")
    found = next((str(row[key]) for key in ANSWER_KEYS if row.get(key) not in (None, "")), None)
    return Asked(name, question.strip(), None if found is None else gold_of(found))


def gold_of(text: str) -> str | None:
    r"""The final answer of a solution: after `####`, in `\boxed{}`, or all of it where it is one line."""
    short = None if "\n" in text.strip() else text.strip()
    return final_answer(text) or last_boxed(text) or short
