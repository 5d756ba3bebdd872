"""Questions with their solutions, from any file or Hub dataset of word problems."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from kvc.data.answers import final_answer, last_boxed
from kvc.data.traces import HUB, hub_records, read_records
from kvc.errors import UserError

QUESTION_KEYS = ("question", "problem")


class Item(NamedTuple):
    """One question.

    Attributes:
        problem: The question.
        reasoning: How it is solved; empty where the record does not say.
        solution: The final answer; empty where the record does not say.
    """

    problem: str
    reasoning: str
    solution: str


def load_items(source: str, split: str = "train") -> list[Item]:
    r"""All questions of a source, in its order.

    A record has the question under `question` or `problem`. The rest is read as `reasoning` and `solution`, as
    `solution` and `answer` (LIMO, MATH), or as one text that ends in its answer after `####` or in `\boxed{}` (GSM8K).

    Args:
        source: JSON list or JSONL file, or `hub:owner/name[:config]` (`hub:GAIR/LIMO`).
        split: Split of a Hub dataset; a file has none.

    Raises:
        UserError: The source is missing, empty or malformed; the sentence names line and key.
    """
    rows: Iterator[tuple[str, dict[str, Any]]]
    if source.startswith(HUB):
        rows = hub_records(source.removeprefix(HUB), split)
    else:
        rows = read_records(Path(source).expanduser())
    items = [item_from_record(where, row) for where, row in rows]
    if not items:
        raise UserError(f"{source}: split {split!r} holds no records")
    return items


def item_from_record(where: str, row: dict[str, Any]) -> Item:
    """One record as an item.

    Raises:
        UserError: The question is missing, or a value is not text; the sentence starts with `where`.
    """
    key = next((key for key in QUESTION_KEYS if row.get(key) is not None), None)
    if key is None:
        raise UserError(f"{where}: has none of the keys {', '.join(QUESTION_KEYS)}")
    problem = _text(where, row, key)
    if not problem:
        raise UserError(f"{where}: key {key!r} is empty")
    reasoning, solution, answer = (_text(where, row, key) for key in ("reasoning", "solution", "answer"))
    if reasoning:
        return Item(problem, reasoning, solution or answer)
    if solution and answer:
        return Item(problem, solution, answer)
    whole = solution or answer
    gold = final_answer(whole) or last_boxed(whole)
    if gold is None:
        # A text of several lines without an announced answer explains; a short one answers.
        return Item(problem, whole, "") if "\n" in whole else Item(problem, "", whole)
    return Item(problem, whole.rpartition("####")[0].rstrip() or whole, gold)


def _text(where: str, row: dict[str, Any], key: str) -> str:
    value = row.get(key)
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise UserError(f"{where}: key {key!r} must be text, got {type(value).__name__}")
    return str(value).strip()
