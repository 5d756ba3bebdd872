"""Reasoning traces with `<COMP>` markers: records, files, and the marker-free text that a model sees."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from kvc.core.files import write_text
from kvc.data.answers import final_answer, normalize_number, same_answer
from kvc.errors import UserError

MARKER = "<COMP>"
HUB = "hub:"
KEYS = ("question", "reasoning_with_compression", "answer", "original_reasoning")
MAX_MARKS = 20
_IN_NUMBER = re.compile(
    rf"\d{MARKER}\d|\d[ \t]*{MARKER}[.,]\d|\d[.,]{MARKER}[ \t]*\d|[$€£¥-]{MARKER}[ \t]*\d|\d[ \t]*{MARKER}[ \t]*%"
)
_OPERATOR_AFTER = re.compile(
    rf"{MARKER}[ \t]*(?:[=+\u00d7\u00f7\u2248/<>]|[*-][ \t]*\d|\\(?:times|div|cdot|approx|frac)\b)(?!COMP>)"
)
_OPERATOR_BEFORE = re.compile(
    rf"(?:[=+\u00d7\u00f7\u2248]|\d[ \t]*[-/]|(?<!\*)\*(?!\*)|\\(?:times|div|cdot|approx))[ \t]*{MARKER}"
)
_ANNOTATION = re.compile(r"<<[^<>\n]*(?:<COMP>[^<>\n]*)+>>")
_BLANKS = " \t"


def _without_gap(before: str, after: str, offset: int) -> tuple[str, str]:
    """The texts on both sides of a marker, changed so that their concatenation shows no gap.

    Args:
        before: Text up to the marker.
        after: Text from the marker to the next one.
        offset: Number of characters of `before` up to the last visible one.
    """
    left = before.rstrip(_BLANKS)
    if offset == 0:
        return "", after.lstrip()
    if left.endswith("\n"):
        after = after.lstrip(_BLANKS)
        # A marker alone on its line: keep as many line breaks as the longer side has.
        breaks = max(len(left) - len(left.rstrip("\n")), len(after) - len(after.lstrip("\n")))
        return left.rstrip("\n") + "\n" * breaks, after.lstrip("\n")
    if not after or after[0].isspace() or after[0] in ".,;:!?)]}%":
        return left, after
    apart = len(left) < len(before) or (left[-1].isalnum() and after[0].isalnum())
    return (f"{left} " if apart else left), after


def strip_markers(text: str) -> tuple[str, tuple[int, ...]]:
    r"""Remove every marker without leaving a trace of where it stood.

    Blanks before a marker and before every line break go, two words never become one, and the line of a marker that
    stood alone disappears. What is left is what a model sees at inference, where nobody has put markers.

    Args:
        text: Text with literal `<COMP>`; a line break of two characters becomes one.

    Returns:
        The text, and the offsets in it after which a COMP follows: each is the end of the last visible character
        before the marker, ascending; duplicate and leading markers collapse.
    """
    text = text.replace("\r\n", "\n")
    text = re.sub(rf"[ \t]*{MARKER}[ \t]*(?=\n|\Z)", MARKER, text)
    text = re.sub(r"[ \t]+(?=\n|\Z)", "", text)
    out, *pieces = text.split(MARKER)
    marks: list[int] = []
    for piece in pieces:
        offset = len(out.rstrip())
        if offset and offset not in marks[-1:]:
            marks.append(offset)
        out = "".join(_without_gap(out, piece, offset))
    return out, tuple(marks)


@dataclass(frozen=True)
class Trace:
    """One solved problem with markers.

    Attributes:
        question: The problem.
        reasoning_with_compression: The solution with literal `<COMP>`, ending in `#### N`.
        answer: The gold answer.
        original_reasoning: The gold solution it was made from, if there is one.
        extra: All other keys of the record, such as `source`, `annotator`, `model` and `valid`.
    """

    question: str
    reasoning_with_compression: str
    answer: str
    original_reasoning: str = ""
    extra: dict[str, Any] = field(default_factory=dict, hash=False)

    @cached_property
    def _stripped(self) -> tuple[str, tuple[int, ...]]:
        return strip_markers(self.reasoning_with_compression)

    @property
    def text(self) -> str:
        """The solution without markers."""
        return self._stripped[0]

    @property
    def marks(self) -> tuple[int, ...]:
        """Character offsets in `text` after which a COMP follows."""
        return self._stripped[1]

    def record(self) -> dict[str, Any]:
        """The trace as the object that is written to a file."""
        return {key: getattr(self, key) for key in KEYS} | self.extra


def read_records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a JSON list or JSONL file, told apart by content.

    Yields:
        Where the object is ("FILE line 3" or "FILE record 3", from 1), and the object.

    Raises:
        UserError: The file cannot be read, is empty, or holds something that is not an object.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text (byte {error.start})") from None
    rows: list[tuple[str, Any]] = []
    try:
        where = ""
        if text.lstrip().startswith("["):
            rows = [(f"{path} record {number}", row) for number, row in enumerate(json.loads(text), start=1)]
        else:
            # Not splitlines: it also breaks at separators that JSON allows inside strings.
            for number, line in enumerate(text.split("\n"), start=1):
                if line.strip():
                    where = f"{path} line {number}"
                    rows.append((where, json.loads(line)))
    except json.JSONDecodeError as error:
        where = where or f"{path} line {error.lineno}"
        raise UserError(f"{where}: not valid JSON: {error.msg} (column {error.colno})") from None
    except RecursionError:
        raise UserError(f"{where or path}: not valid JSON: nested too deeply") from None
    if not rows:
        raise UserError(f"{path}: holds no records")
    for where, row in rows:
        if not isinstance(row, dict):
            raise UserError(f"{where}: expected an object, got {type(row).__name__}")
        yield where, row


def trace_from_record(where: str, row: dict[str, Any]) -> Trace:
    """A trace from an object.

    Raises:
        UserError: A key is missing or not text; the message starts with `where`.
    """
    values: dict[str, str] = {}
    for key in KEYS:
        value = row.get(key)
        if key == "answer" and isinstance(value, int | float) and not isinstance(value, bool):
            value = str(value)
        if key == "original_reasoning" and value is None:
            value = ""
        if value is None:
            raise UserError(f"{where}: key {key!r} is missing")
        if not isinstance(value, str):
            raise UserError(f"{where}: key {key!r} must be text, got {type(value).__name__}")
        if key != "original_reasoning" and not value.strip():
            raise UserError(f"{where}: key {key!r} is empty")
        values[key] = value
    return Trace(**values, extra={key: value for key, value in row.items() if key not in KEYS})


def read_traces(path: str | Path) -> list[Trace]:
    """All traces of a JSON list or JSONL file.

    Raises:
        UserError: The file is missing, empty or malformed; the message names file, line (or record) and key.
    """
    return [trace_from_record(where, row) for where, row in read_records(Path(path))]


def hub_records(name: str, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a Hub dataset, without remote code; offline it must be in the local cache.

    Args:
        name: `owner/name`, or `owner/name:config` where a dataset has several configurations.
        split: The split.

    Raises:
        UserError: The dataset cannot be loaded.
    """
    import datasets

    repository, _, config = name.partition(":")
    try:
        rows = datasets.load_dataset(repository, config or None, split=split)
    except Exception as error:  # the library raises a dozen kinds, all of which mean: not available
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise UserError(f"{HUB}{name}: cannot load split {split!r}: {reason}") from None
    for number, row in enumerate(rows, start=1):
        yield f"{HUB}{name} record {number}", dict(row)


def load_traces(source: str, split: str = "train") -> list[Trace]:
    """Traces from a local file or, as `hub:owner/name`, from the Hugging Face Hub.

    Args:
        source: Path, `hub:owner/name` or `hub:owner/name:config`.
        split: Split of a Hub dataset; a file has none.

    Raises:
        UserError: The source is missing, empty or malformed.
    """
    if not source.startswith(HUB):
        return read_traces(source)
    traces = [trace_from_record(where, row) for where, row in hub_records(source.removeprefix(HUB), split)]
    if not traces:
        raise UserError(f"{source}: split {split!r} holds no records")
    return traces


def synthetic_traces(n: int, seed: int = 42, split: str = "train", steps: tuple[int, int] = (2, 8)) -> list[Trace]:
    """Generated traces whose markers are the ground truth; the splits share no problem.

    Args:
        n: Number of traces.
        seed: Seed of the generator.
        split: `"train"`, `"val"` or `"test"`.
        steps: Smallest and largest number of calculations.
    """
    from kvc.data.synthetic.reasoning import problem_for

    extra = {"source": "synthetic:reasoning", "annotator": "synthetic", "valid": True}
    problems = (problem_for(split, seed, index, steps) for index in range(n))
    return [
        Trace(p.question, p.reasoning_with_compression, p.answer, p.original_reasoning, dict(extra)) for p in problems
    ]


def write_jsonl(path: str | Path, traces: Iterable[Trace]) -> None:
    """Write one trace per line; the file appears complete or not at all."""
    lines = (json.dumps(trace.record(), ensure_ascii=False) for trace in traces)
    write_text(path, "".join(f"{line}\n" for line in lines))


def validate(trace: Trace, max_marks: int = MAX_MARKS) -> list[str]:
    """The reasons against a trace; none means it is valid.

    Codes: `missing_final_answer` (no `#### N`), `wrong_answer`, `no_marker`, `too_many_markers`, `marker_in_number`,
    `marker_in_equation` (between the parts of an equation on one line), `marker_in_annotation` (inside `<<...>>`) and
    `empty_piece` (a leading marker, or nothing between two markers).

    Args:
        trace: The trace.
        max_marks: Largest number of markers.
    """
    marked = trace.reasoning_with_compression
    reasons = []
    final = final_answer(trace.text)
    if final is None or normalize_number(final) is None:
        reasons.append("missing_final_answer")
    elif not same_answer(final, trace.answer):
        reasons.append("wrong_answer")
    count = marked.count(MARKER)
    if count == 0:
        return [*reasons, "no_marker"]
    if count > max_marks:
        reasons.append("too_many_markers")
    if _ANNOTATION.search(marked):
        reasons.append("marker_in_annotation")
        marked = _ANNOTATION.sub("", marked)
    if _IN_NUMBER.search(marked):
        reasons.append("marker_in_number")
    if _OPERATOR_AFTER.search(marked) or _OPERATOR_BEFORE.search(marked):
        reasons.append("marker_in_equation")
    # After the last marker nothing needs to follow: some annotators close the answer line with one.
    if any(not piece.strip() for piece in trace.reasoning_with_compression.split(MARKER)[:-1]):
        reasons.append("empty_piece")
    return reasons


def filter_valid(traces: Iterable[Trace], max_marks: int = MAX_MARKS) -> tuple[list[Trace], Counter[str]]:
    """The valid traces in order, and how often each reason spoke against one of the others."""
    valid, reasons = [], Counter[str]()
    for trace in traces:
        found = validate(trace, max_marks)
        reasons.update(found)
        if not found:
            valid.append(trace)
    return valid, reasons
