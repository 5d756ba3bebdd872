"""What became of one question: one line of the journal."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

from kvc.data.annotate.chat.pool import Item
from kvc.data.traces import Trace, validate

Status = Literal["valid", "rejected", "failed"]
NAME = "openai"


@dataclass(frozen=True)
class Outcome:
    """One answered (or finally unanswered) question.

    Attributes:
        key: The question's key.
        status: `"valid"`, `"rejected"` (a reply that is no valid trace) or `"failed"` (no reply).
        text: The solution with markers as the model wrote it; empty if there was no reply.
        reasons: Codes of what speaks against it.
        requests: Requests it took, retries included.
        tokens_in: Tokens of the prompt.
        tokens_out: Tokens of the reply.
        structured: Whether the reply was asked for as a JSON object.
        message: What the server did, if there was no reply.
    """

    key: str
    status: Status
    text: str = ""
    reasons: tuple[str, ...] = ()
    requests: int = 1
    tokens_in: int = 0
    tokens_out: int = 0
    structured: bool = True
    message: str = ""

    def record(self) -> dict[str, Any]:
        """The line of the journal as an object."""
        return asdict(self)


def outcome_of(record: Any) -> Outcome:
    """The outcome in a line of a journal.

    Raises:
        ValueError: It is none.
    """
    try:
        outcome = Outcome(**{**record, "reasons": tuple(record["reasons"])})
    except (TypeError, KeyError) as error:
        raise ValueError("not an outcome") from error
    counts = (outcome.requests, outcome.tokens_in, outcome.tokens_out)
    texts = (outcome.key, outcome.text, outcome.message, *outcome.reasons)
    if (
        outcome.status not in ("valid", "rejected", "failed")
        or not all(isinstance(text, str) for text in texts)
        or not all(isinstance(count, int) for count in counts)
    ):
        raise ValueError("not an outcome")
    return outcome


def trace_of(item: Item, text: str, model: str) -> Trace:
    """The trace that a solution makes, not yet validated."""
    gold = item.gold
    extra = {"source": gold.source, "annotator": NAME, "model": model, "valid": True}
    return Trace(gold.question, text, gold.answer, gold.reasoning, extra)


def verdict(trace: Trace, reasons: tuple[str, ...]) -> tuple[Status, tuple[str, ...]]:
    """Whether a reply makes a valid trace: first what is wrong with the text, else what is wrong with the trace."""
    found = reasons or tuple(validate(trace))
    return ("rejected" if found else "valid"), found
