"""SQuAD as it is published: the official JSON of v1.1 and v2.0, and the rows of the Hugging Face Hub."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kvc.data.squad.example import SquadExample, unanswerable
from kvc.data.traces import HUB, hub_records
from kvc.errors import UserError


def load_squad(source: str, split: str = "train") -> list[SquadExample]:
    """Questions from an official JSON file or, as `hub:owner/name`, from the Hub.

    Args:
        source: A path, or `hub:rajpurkar/squad`, `hub:rajpurkar/squad_v2`.
        split: Split of a Hub dataset; a file has none.

    Raises:
        UserError: The source is missing, empty or malformed; names the file and the place in it.
    """
    if source.startswith(HUB):
        rows = hub_records(source.removeprefix(HUB), split)
        examples = [_from_row(where, row) for where, row in rows]
    else:
        examples = list(_from_document(source, _parsed(Path(source))))
    if not examples:
        raise UserError(f"{source}: holds no questions")
    seen: set[str] = set()
    for example in examples:
        if example.key in seen:
            raise UserError(f"{source}: two questions have the id {example.key!r}")
        seen.add(example.key)
    return examples


def _parsed(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text (byte {error.start})") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path} line {error.lineno}: not valid JSON: {error.msg} (column {error.colno})") from None
    except RecursionError:
        raise UserError(f"{path}: not valid JSON: nested too deeply") from None


def _from_document(path: str, document: Any) -> Iterator[SquadExample]:
    if not isinstance(document, dict) or "data" not in document:
        raise UserError(f"{path}: not the official form of SQuAD: expected an object with the key 'data'")
    for article_at, article in _items(f"{path}: data", document["data"]):
        for paragraph_at, paragraph in _items(f"{article_at}.paragraphs", _value(article_at, article, "paragraphs")):
            context = _text(paragraph_at, paragraph, "context")
            for where, qa in _items(f"{paragraph_at}.qas", _value(paragraph_at, paragraph, "qas")):
                yield _from_qa(where, qa, context)


def _from_qa(where: str, qa: Any, context: str) -> SquadExample:
    key, question = _text(where, qa, "id"), _text(where, qa, "question")
    impossible = qa.get("is_impossible", False)
    if not isinstance(impossible, bool):
        raise UserError(f"{where}.is_impossible: expected true or false, got {impossible!r}")
    found = _items(f"{where}.answers", _value(where, qa, "answers"))
    if impossible:
        if found:
            raise UserError(f"{where}: is_impossible is true, yet there are answers")
        return unanswerable(key, context, question)
    answers = [(at, _text(at, answer, "text"), _value(at, answer, "answer_start")) for at, answer in found]
    return _answered(where, key, context, question, answers)


def _from_row(where: str, row: dict[str, Any]) -> SquadExample:
    key, context, question = (_text(where, row, name) for name in ("id", "context", "question"))
    given = _value(where, row, "answers")
    texts, starts = _value(f"{where}: answers", given, "text"), _value(f"{where}: answers", given, "answer_start")
    if not texts:
        return unanswerable(key, context, question)
    answers = [(f"{where}: answers[{i}]", text, start) for i, (text, start) in enumerate(zip(texts, starts))]
    return _answered(where, key, context, question, answers)


def _answered(where: str, key: str, context: str, question: str, answers: list[tuple[str, str, Any]]) -> SquadExample:
    if not answers:
        raise UserError(f"{where}: has no answer and is not marked is_impossible")
    for at, text, start in answers:
        if not isinstance(start, int) or isinstance(start, bool):
            raise UserError(f"{at}.answer_start: expected a whole number, got {start!r}")
        if not text.strip():
            raise UserError(f"{at}.text: is empty")
        if start < 0 or context[start : start + len(text)] != text:
            raise UserError(f"{at}: the context does not hold {text!r} at answer_start {start}")
    return SquadExample(key, context, question, tuple(a[1] for a in answers), tuple(a[2] for a in answers))


def _items(where: str, value: Any) -> list[tuple[str, Any]]:
    if not isinstance(value, list):
        raise UserError(f"{where}: expected a list, got {type(value).__name__}")
    return [(f"{where}[{number}]", item) for number, item in enumerate(value)]


def _value(where: str, record: Any, key: str) -> Any:
    if not isinstance(record, dict):
        raise UserError(f"{where}: expected an object, got {type(record).__name__}")
    if key not in record:
        raise UserError(f"{where}: key {key!r} is missing")
    return record[key]


def _text(where: str, record: Any, key: str) -> str:
    value = _value(where, record, key)
    if not isinstance(value, str):
        raise UserError(f"{where}.{key}: expected text, got {type(value).__name__}")
    return value
