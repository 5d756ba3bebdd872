"""What went wrong with one request, and what follows: ask again, ask differently, give up, or stop everything."""

import re
from dataclasses import dataclass
from typing import Any, Literal

from kvc.data.annotate.chat.endpoint import KEY_VARIABLE, Endpoint
from kvc.data.annotate.chat.retry import is_retried, retry_after

_FORMAT = re.compile(r"response_format|json_?\s?schema|structured[ _]output|guided|grammar", re.IGNORECASE)
NEWER_LIMIT = "max_completion_tokens"
_UNKNOWN_PARAMETER = frozenset({400, 422})


@dataclass(frozen=True)
class Problem:
    """A request without a usable response.

    Attributes:
        action: `"again"` (it may pass), `"plain"` (without response_format), `"limit"` (with the newer name of
            max_tokens), `"fail"` (this question will not be answered) or `"stop"` (no question will be).
        reason: Code for counting, such as `http_429` or `timeout`.
        message: What to tell the user.
        wait: Seconds that the server asks to wait.
        unreachable: Whether no connection could be made at all.
    """

    action: Literal["again", "plain", "limit", "fail", "stop"]
    reason: str
    message: str
    wait: float = 0.0
    unreachable: bool = False


def server_message(body: Any) -> tuple[str, str]:
    """The message and the code in the body of an error, in the forms that servers use."""
    body = body.get("error", body) if isinstance(body, dict) else body
    if not isinstance(body, dict):
        return body if isinstance(body, str) else "", ""
    message = body.get("message") or body.get("detail") or ""
    return message if isinstance(message, str) else str(message), str(body.get("code") or body.get("type") or "")


def problem_of(error: Exception, endpoint: Endpoint) -> Problem | None:
    """Judge an exception of the client library.

    Args:
        error: What a request raised.
        endpoint: Where it went.

    Returns:
        None for an exception that no server can cause.
    """
    import openai

    url = endpoint.base_url
    if isinstance(error, TimeoutError | openai.APITimeoutError):
        return Problem("again", "timeout", f"{url} does not answer in time", unreachable=_no_connection(error))
    if isinstance(error, openai.APIStatusError):
        return _of_status(error, endpoint)
    if isinstance(error, openai.APIConnectionError):
        cause = endpoint.quote(str(error.__cause__ or "")).rstrip(".") or "connection lost"
        unreachable = _no_connection(error)
        verb = "cannot be reached" if unreachable else "dropped the connection"
        return Problem("again", "dropped_connection", f"{url} {verb} ({cause})", unreachable=unreachable)
    return None


def _no_connection(error: Exception) -> bool:
    """Whether not even a connection was made; the cause comes from the library's HTTP client, whichever that is."""
    return type(error.__cause__).__name__ in {"ConnectError", "ConnectTimeout", "UnsupportedProtocol", "ProxyError"}


def _of_status(error: Any, endpoint: Endpoint) -> Problem:
    url, status = endpoint.base_url, int(error.status_code)
    text, code = server_message(error.body)
    said = endpoint.quote(text)
    reason, message = f"http_{status}", f"{url} answers {status}" + (f": {said}" if said else "")
    if status == 401:
        state = "is not accepted" if endpoint.key else "is not set"
        return Problem("stop", reason, f"{url} answers 401: the key in {KEY_VARIABLE} {state}")
    if status == 402 or code == "insufficient_quota":
        return Problem("stop", reason, f"{message or url} (the account has no credit left)")
    if status in {403, 404}:
        return Problem("stop", reason, message)
    if is_retried(status):
        return Problem("again", reason, message, wait=retry_after(error.response.headers))
    if status in _UNKNOWN_PARAMETER and NEWER_LIMIT in text:
        return Problem("limit", reason, message)
    if status in _UNKNOWN_PARAMETER and _FORMAT.search(f"{text} {getattr(error, 'param', '')}"):
        return Problem("plain", reason, message)
    return Problem("fail", reason, message)
