r"""Documents to study, from a JSON list or JSONL file.

A record is a solved problem, with the keys `question`, `solution` (the reasoning) and `answer`, or `problem`,
`reasoning` and `solution` (the text after the reasoning); or any `text`. All records of a file are of one kind.
"""

from pathlib import Path
from typing import Any, Literal, NamedTuple

from kvc.data.traces import read_records
from kvc.errors import UserError

Kind = Literal["problem", "text"]
KEYS: dict[str, tuple[str, ...]] = {
    "question": ("question", "solution", "answer"),
    "problem": ("problem", "reasoning", "solution"),
    "text": ("text",),
}
"""By the first key of each set."""


class Document(NamedTuple):
    """One document.

    Attributes:
        where: File and line it comes from.
        kind: A solved problem, or any text.
        body: How it reads.
    """

    where: str
    kind: Kind
    body: str

    def block(self, number: int) -> str:
        """The document as it is shown, the `number`-th from 1."""
        return self.body if self.kind == "problem" else f"Document {number}: {self.body}\n"


def read_documents(path: str | Path, limit: int | None = None, reverse: bool = False) -> list[Document]:
    """The documents of a file.

    Args:
        path: JSON list or JSONL.
        limit: Only the first so many; None takes all.
        reverse: Turn their order round, for files that have the most similar first: what is read last is remembered
            best.

    Raises:
        UserError: The file is missing, empty or malformed, a key is missing or empty (the line is named), or kinds
            are mixed.
    """
    documents = [_document(where, row) for where, row in read_records(Path(path))]
    for document in documents:
        if document.kind != documents[0].kind:
            raise UserError(f"{document.where}: solved problems and plain texts cannot be studied together")
    documents = documents[:limit]
    return documents[::-1] if reverse else documents


def _document(where: str, row: dict[str, Any]) -> Document:
    keys = next((keys for first, keys in KEYS.items() if first in row), None)
    if keys is None:
        raise UserError(f"{where}: none of the keys {', '.join(map(repr, KEYS))} is there")
    values = [_value(where, row, key) for key in keys]
    if keys[0] == "text":
        return Document(where, "text", values[0])
    question, reasoning, end = values
    body = f"###Problem:\n---\n{question}\n---\n###Reasoning:\n---\n<think>\n{reasoning}\n</think>\n"
    body += f"---\n###Solution:\n---\n{end}" if keys[0] == "problem" else rf"The answer is\boxed{{{end}}}"
    return Document(where, "problem", f"{body}\n---\n\n")


def _value(where: str, row: dict[str, Any], key: str) -> str:
    value = row.get(key)
    if value is None:
        raise UserError(f"{where}: key {key!r} is missing")
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        raise UserError(f"{where}: key {key!r} must be text, got {type(value).__name__}")
    if not value.strip():
        raise UserError(f"{where}: key {key!r} is empty")
    return value.strip()
