"""When to ask again: exponential back-off with jitter, and what `Retry-After` says."""

import math
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime

RETRIED = frozenset({408, 409, 429})
MIN_SERVER_ERROR = 500


@dataclass(frozen=True)
class Retry:
    """How long and how often.

    Attributes:
        attempts: Requests for one question before it counts as failed.
        first: Seconds before the second request; each further wait is twice as long.
        longest: Longest wait in seconds that this side chooses by itself.
        patience: Longest wait in seconds that a server may ask for.
    """

    attempts: int = 8
    first: float = 1.0
    longest: float = 60.0
    patience: float = 600.0

    def delay(self, attempt: int, asked: float = 0.0) -> float:
        """Seconds to wait after failed attempt number `attempt` (from 1), never less than the server asked for.

        Half of the wait is random, so that requests that failed together do not come back together.
        """
        whole = min(self.longest, self.first * 2.0 ** min(attempt - 1, 60))
        return asked + whole * random.uniform(0.5, 1.0)


def is_retried(status: int) -> bool:
    """Whether an HTTP status says that the same request may succeed later."""
    return status in RETRIED or status >= MIN_SERVER_ERROR


def _seconds(text: str | None) -> float | None:
    try:
        value = float(text) if text is not None else math.nan
    except ValueError:
        return None
    return None if math.isnan(value) else max(0.0, value)


def retry_after(headers: Mapping[str, str]) -> float:
    """Seconds that a response asks to wait; 0 if it says nothing, or nothing that can be understood.

    `Retry-After` holds seconds or an HTTP date (RFC 9110, 10.2.3). A date is compared with the response's own `Date`,
    so that a wrong clock on this side does no harm. OpenAI also sends `retry-after-ms`, which is finer.

    Args:
        headers: Response headers; their case does not matter.
    """
    lower = {name.lower(): value for name, value in headers.items()}
    milliseconds = _seconds(lower.get("retry-after-ms"))
    if milliseconds is not None:
        return milliseconds / 1000
    text = lower.get("retry-after")
    seconds = _seconds(text)
    if seconds is not None or text is None:
        return seconds or 0.0
    try:
        until = parsedate_to_datetime(text).timestamp()
    except (ValueError, OverflowError):
        return 0.0
    try:
        now = parsedate_to_datetime(lower["date"]).timestamp()
    except (KeyError, ValueError, OverflowError):
        now = time.time()
    return max(0.0, until - now)
