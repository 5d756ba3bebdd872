"""The same samples as several runs answered them, side by side."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvc.report.folder import Finished
from kvc.runs import PREDICTIONS

READ = 1000  # records of each run among which common ids are sought
PROMPTS = ("prompt", "question", "context", "input")
GOLDS = ("gold", "answer", "target", "reference")
COMPLETIONS = ("completion", "prediction", "output", "generated")
TOKENS = ("text", "ends", "scores", "labels")
SHADES = 5
Record = dict[str, Any]


@dataclass(frozen=True)
class Piece:
    """A stretch of text whose tokens have about the same score.

    Attributes:
        text: The characters.
        shade: 0 (score 0) to `SHADES` (score 1).
        mark: Whether the data have a mark after it.
    """

    text: str
    shade: int
    mark: bool


@dataclass(frozen=True)
class Answer:
    """What one run said of a sample.

    Attributes:
        run: Label of the run.
        completion: The text; empty if the method generates none.
        correct: Whether it was right; None if that is not known.
        pieces: Scored text, of methods that give every token a score.
    """

    run: str
    completion: str = ""
    correct: bool | None = None
    pieces: tuple[Piece, ...] = ()


@dataclass(frozen=True)
class Sample:
    """One sample and all answers to it.

    Attributes:
        id: Its id in the data.
        about: Short further fields, such as `task`.
        prompt: The prompt; empty where the records do not hold it.
        gold: The right answer; empty where the records do not hold it.
        answers: In the order of the runs.
    """

    id: str
    about: str
    prompt: str
    gold: str
    answers: tuple[Answer, ...]


@dataclass
class Samples:
    """The samples to show.

    Attributes:
        samples: The first ones that the runs have in common.
        missing: One sentence for everything that cannot be shown.
    """

    samples: list[Sample] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    @property
    def scored(self) -> bool:
        """Whether any answer is a text with scores."""
        return any(answer.pieces for sample in self.samples for answer in sample.answers)


def read_samples(runs: Sequence[Finished], count: int) -> Samples:
    """The first samples that all runs with predictions have in common.

    Args:
        runs: The runs.
        count: Number of samples at most.
    """
    found, by_run = Samples(), {}
    for run in runs:
        try:
            by_run[run.label] = read_records(run.evaluation / PREDICTIONS, READ)
        except (OSError, ValueError) as error:
            found.missing.append(f"{run.label}: {error}")
    shown = {label: records for label, records in by_run.items() if any(map(_tells, records.values()))}
    found.missing += [f"{label}: its predictions hold no text" for label in by_run if label not in shown]
    if not shown:
        return found
    first, *others = shown.values()
    common = [key for key in first if all(key in other for other in others)][:count]
    if not common:
        found.missing.append(f"the first {READ} predictions of the runs have no id in common")
    found.samples = [_sample(key, {label: records[key] for label, records in shown.items()}) for key in common]
    return found


def read_records(path: Path, count: int) -> dict[str, Record]:
    """The first lines of a file of predictions, by id.

    Raises:
        ValueError: If there is no such file, or a line is no JSON object with an id.
    """
    if not path.is_file():
        raise ValueError(f"there is no {PREDICTIONS}")
    records: dict[str, Record] = {}
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if number > count:
                break
            try:
                record = json.loads(line)
            except ValueError:  # not JSON, or not UTF-8
                record = None
            if not isinstance(record, dict) or "id" not in record:
                raise ValueError(f"line {number} of its {PREDICTIONS} is broken: not a JSON object with an id")
            records[str(record["id"])] = record
    return records


def pieces_of(record: Record) -> tuple[Piece, ...]:
    """Neighbouring tokens of about the same score as one piece; empty if the record has no scored tokens."""
    if not _scored(record):
        return ()
    pieces: list[Piece] = []
    start = 0
    for end, score, label in zip(record["ends"], record["scores"], record["labels"]):
        piece = Piece(record["text"][start:end], round(SHADES * min(max(score, 0.0), 1.0)), label == 1)
        start = end
        if pieces and pieces[-1].shade == piece.shade and not pieces[-1].mark:
            piece = Piece(pieces.pop().text + piece.text, piece.shade, piece.mark)
        pieces.append(piece)
    return (*pieces, Piece(record["text"][start:], 0, False)) if start < len(record["text"]) else tuple(pieces)


def _sample(key: str, records: Mapping[str, Record]) -> Sample:
    first = next(iter(records.values()))
    about = {
        k: v for k, v in first.items() if isinstance(v, str | int) and k in ("task", "level", "category", "dataset")
    }
    return Sample(
        id=key,
        about=", ".join(f"{k} {v}" for k, v in about.items()),
        prompt=_text(records, PROMPTS),
        gold=_text(records, GOLDS),
        answers=tuple(_answer(label, record) for label, record in records.items()),
    )


def _answer(run: str, record: Record) -> Answer:
    correct = record.get("correct")
    return Answer(
        run=run,
        completion=_text({run: record}, COMPLETIONS),
        correct=bool(correct) if isinstance(correct, bool | int | float) else None,
        pieces=pieces_of(record),
    )


def _text(records: Mapping[str, Record], keys: Sequence[str]) -> str:
    """The first of some fields that any record has."""
    for record in records.values():
        for key in keys:
            if isinstance(value := record.get(key), str | int | float) and str(value):
                return str(value)
    return ""


def _tells(record: Record) -> bool:
    return _scored(record) or any(key in record for key in COMPLETIONS)


def _scored(record: Record) -> bool:
    """Whether every token of a text has a score and a label."""
    if not isinstance(record.get("text"), str):
        return False
    lists = [record.get(key) for key in TOKENS[1:]]
    if not all(isinstance(values, list) and len(values) == len(lists[0] or []) for values in lists):
        return False
    return all(isinstance(v, int | float) and math.isfinite(v) for values in lists for v in values or [])
