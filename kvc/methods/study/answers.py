"""The file of answers: a journal while they are made, one JSON file at the end."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvc.core.files import digest, write_json, write_text
from kvc.errors import UserError

SCHEMA = 1
KIND = "ask"


class AnswerFile:
    """Collects results, so that a run that was killed goes on with the next question.

    Args:
        path: JSON file that appears at the end; None keeps nothing.
        head: Everything but the results: what the answers depend on.
        overwrite: Replace a file of other answers.

    Raises:
        UserError: If the file is there and holds other answers.
    """

    def __init__(self, path: Path | None, head: dict[str, Any], overwrite: bool = False) -> None:
        self.path = path
        # As it will be read back.
        self.head: dict[str, Any] = json.loads(json.dumps({"schema": SCHEMA, "kind": KIND, **head}))
        self.results: list[dict[str, Any]] = []
        self.finished = False
        if path is None:
            return
        self.journal = path.with_name(f"{path.name}.journal.jsonl")
        if path.is_dir():
            raise UserError(f"--output_file {path}: is a folder")
        if path.exists():
            self._meet(path, overwrite)
        if not self.finished:
            self._resume()

    def _meet(self, path: Path, overwrite: bool) -> None:
        """A file is there: these answers, or others."""
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            results = found.pop("results")
        except (OSError, ValueError, KeyError, AttributeError):
            found, results = None, []
        if not overwrite:
            if found != self.head:
                raise UserError(f"--output_file {path}: exists and holds something else; add --overwrite to replace it")
            self.results, self.finished = results, True

    def _resume(self) -> None:
        """Take the results of a run that was killed; a line that was cut off is dropped."""
        name = digest(self.head)
        try:
            lines = self.journal.read_text(encoding="utf-8").split("\n")[:-1] if self.journal.is_file() else []
            rows = [json.loads(line) for line in lines]
        except (OSError, ValueError) as error:
            raise UserError(f"{self.journal}: damaged, remove it to begin anew: {error}") from error
        if rows and rows[0] == {"identity": name}:
            self.results = rows[1:]
        kept = [json.dumps({"identity": name}), *(json.dumps(row) for row in self.results)]
        write_text(self.journal, "".join(f"{line}\n" for line in kept))

    def has(self, arm: str, name: int | str) -> bool:
        """Whether a question was answered already."""
        return any(result["arm"] == arm and result["id"] == name for result in self.results)

    def add(self, results: Sequence[dict[str, Any]]) -> None:
        """Keep results."""
        self.results += results
        if self.path is not None:
            with self.journal.open("a", encoding="utf-8") as file:
                file.write("".join(f"{json.dumps(result)}\n" for result in results))

    def finish(self, ids: Sequence[int | str]) -> dict[str, Any]:
        """Write the file, question by question in this order; returns its content."""
        order = {(type(name), name): number for number, name in enumerate(ids)}
        arms = {arm: number for number, arm in enumerate(self.head["arms"])}
        self.results.sort(key=lambda r: (order[type(r["id"]), r["id"]], arms[r["arm"]]))
        content = {**self.head, "results": self.results}
        if self.path is not None:
            write_json(self.path, content)
            self.journal.unlink(missing_ok=True)
        return content
