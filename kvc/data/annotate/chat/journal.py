"""Every paid answer on disk before the next question: an append-only file that survives a kill at any byte."""

import fcntl
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from kvc.data.annotate.chat.outcome import Outcome, outcome_of
from kvc.errors import UserError

VERSION = 1
_HEAD = b'{"kvc_journal": '


class Journal:
    """Header line with the settings, then one line an outcome, each forced to disk.

    The file appears with the first outcome. A last line that was cut short is removed when the journal is opened again.

    Args:
        path: The file.
        settings: What must not change between two sessions, JSON-able.
        overwrite: Discard what the file holds, once there is an outcome to put there.

    Attributes:
        path: The file.
        outcomes: What was read from it and appended since, in order.

    Raises:
        UserError: The file is no journal, was begun with other settings, is damaged, or is in use.
    """

    def __init__(self, path: Path, settings: dict[str, Any], overwrite: bool = False) -> None:
        self.path, self.outcomes = path, list[Outcome]()
        self._settings = settings
        self._file: int | None = None
        self._begun = False
        if path.exists():
            file = self._open(os.O_RDWR)
            try:
                if not overwrite:
                    self._load(file)
            except BaseException:
                self.close()
                raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the file; appending is not possible afterwards."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def append(self, outcome: Outcome) -> None:
        """Write an outcome; it is on disk when this returns.

        Raises:
            UserError: It cannot be written.
        """
        lines = [outcome.record()]
        try:
            file = self._file
            if not self._begun or file is None:
                file = self._begin()
                lines.insert(0, {"kvc_journal": VERSION, "settings": self._settings})
            data = memoryview("".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in lines).encode())
            while data:
                data = data[os.write(file, data) :]
            os.fsync(file)
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written: {error.strerror}") from error
        self._begun = True
        self.outcomes.append(outcome)

    def _open(self, flags: int) -> int:
        try:
            file = self._file = os.open(self.path, flags | os.O_APPEND | os.O_CLOEXEC, 0o644)
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise UserError(f"{self.path}: another process is writing to it") from None
        except OSError as error:
            self.close()
            raise UserError(f"{self.path}: cannot be opened: {error.strerror}") from None
        return file

    def _begin(self) -> int:
        """The file, ready for its header."""
        if self._file is not None:
            os.ftruncate(self._file, 0)
            return self._file
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = self._open(os.O_RDWR | os.O_CREAT)
        if os.fstat(file).st_size:
            raise UserError(f"{self.path}: another process has begun to write to it")
        # A new file survives a power failure only if its folder does too.
        folder = os.open(self.path.parent, os.O_RDONLY)
        with suppress(OSError):
            os.fsync(folder)
        os.close(folder)
        return file

    def _load(self, file: int) -> None:
        raw = self.path.read_bytes()
        if raw[: len(_HEAD)] != _HEAD[: len(raw)]:
            raise UserError(f"{self.path}: is no journal of kvc annotate; choose another --output")
        *lines, torn = raw.split(b"\n")
        end = len(raw) - len(torn)
        for number, line in enumerate(lines, start=1):
            try:
                record = json.loads(line)
                if number > 1:
                    self.outcomes.append(outcome_of(record))
                    continue
            except ValueError:
                if number != len(lines):
                    raise UserError(
                        f"{self.path} line {number}: is damaged; remove the line, or pass --overwrite to start afresh"
                    ) from None
                end -= len(line) + 1
                break
            self._compare(record)
            self._begun = True
        if end != len(raw):
            os.ftruncate(file, end)
            os.fsync(file)

    def _compare(self, header: dict[str, Any]) -> None:
        if header.get("kvc_journal") != VERSION:
            raise UserError(f"{self.path}: was written by another version of kvc; choose another --output")
        before = header.get("settings")
        before = before if isinstance(before, dict) else {}
        changed = [key for key in {**before, **self._settings} if before.get(key) != self._settings.get(key)]
        if changed:
            key = changed[0]
            raise UserError(
                f"{self.path}: was begun with another {key} ({before.get(key)}, now {self._settings.get(key)}): "
                "choose another --output, or pass --overwrite to discard it"
            )
