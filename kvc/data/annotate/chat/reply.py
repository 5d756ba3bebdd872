"""A reply of the server: the solution in it, its tokens, and what is wrong with it as a text."""

import json
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

from kvc.data.annotate.chat.prompt import FIELD
from kvc.data.traces import MARKER, strip_markers

MIN_WORDS = 5
MAX_REPEATS = 4
LONG_LINE = 20  # characters; shorter lines may recur in a sound solution
_THOUGHTS = re.compile(r"\A\s*<think>.*?</think>\s*", re.DOTALL)
_FENCE = re.compile(r"\A```[\w-]*\n(.*?)\n?```\Z", re.DOTALL)
_BROKEN_MARKER = re.compile(r"[<\[(]\s*/?\s*COMP\s*\d*\s*[>\])]|<\s*COMP\b|\bCOMP\s*>", re.IGNORECASE)


@dataclass(frozen=True)
class Reply:
    """One answer of the model.

    Attributes:
        text: The solution with markers; what was sent if no solution could be read from it.
        reasons: Codes against it; empty if it is a sensible text.
        tokens_in: Tokens of the prompt, as the server counts them; 0 if it does not.
        tokens_out: Tokens of the reply.
    """

    text: str
    reasons: tuple[str, ...]
    tokens_in: int = 0
    tokens_out: int = 0


def _tokens(usage: Any, key: str) -> int:
    value = usage.get(key) if isinstance(usage, dict) else None
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0


def _content(message: dict[str, Any]) -> str:
    """The text of a message, which some servers send in parts."""
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return _whole(content) if isinstance(content, str) else ""


def _whole(text: str) -> str:
    """Text without halves of surrogate pairs, which no file can hold."""
    return text.encode(errors="replace").decode()


def _solution(content: str) -> str | None:
    """The solution in the JSON object or plain text that a model sent; None for a broken object."""
    text = _THOUGHTS.sub("", content).strip()
    fenced = _FENCE.match(text)
    text = fenced.group(1).strip() if fenced else text
    if text.startswith("{"):
        try:
            value = json.loads(text, strict=False)
        except (json.JSONDecodeError, RecursionError):
            return None
        found = value.get(FIELD) if isinstance(value, dict) else None
        return _whole(found).replace("\r\n", "\n").strip() if isinstance(found, str) else None
    return text.replace("\r\n", "\n")


def read_reply(body: object) -> Reply | None:
    """The first choice of a chat completion.

    Codes: `truncated` (it ran into max_tokens), `refused`, `empty_reply`, `malformed_json`, and those of `implausible`.

    Args:
        body: The decoded body of the response.

    Returns:
        None if the body is no chat completion.
    """
    choices = body.get("choices") if isinstance(body, dict) else None
    choice = choices[0] if isinstance(choices, list) and choices else None
    message = choice.get("message") if isinstance(choice, dict) else None
    if not (isinstance(body, dict) and isinstance(choice, dict) and isinstance(message, dict)):
        return None
    usage = body.get("usage")
    tokens = _tokens(usage, "prompt_tokens"), _tokens(usage, "completion_tokens")
    content, finish = _content(message), choice.get("finish_reason")
    if message.get("refusal") or finish == "content_filter":
        return Reply(content, ("refused",), *tokens)
    if finish == "length":
        return Reply(content, ("truncated",), *tokens)
    if not content.strip():
        return Reply(content, ("empty_reply",), *tokens)
    solution = _solution(content)
    if solution is None:
        return Reply(content, ("malformed_json",), *tokens)
    return Reply(solution, tuple(implausible(solution)), *tokens)


def implausible(marked: str) -> list[str]:
    """What speaks against a text being a solution at all, whatever its answer.

    Codes: `broken_marker` (a marker in another spelling), `no_reasoning` (almost nothing, or no number, before the
    final line), `text_after_answer` and `repetitive` (one long line more than four times).

    Args:
        marked: A solution with markers.
    """
    text, _ = strip_markers(marked)
    before, _, after = text.rpartition("####")
    reasons = []
    if _BROKEN_MARKER.search(marked.replace(MARKER, "")):
        reasons.append("broken_marker")
    if len(re.findall(r"\w+", before)) < MIN_WORDS or not re.search(r"\d", before):
        reasons.append("no_reasoning")
    if before and "\n" in after.strip():
        reasons.append("text_after_answer")
    lines = Counter(line.strip() for line in text.split("\n") if len(line.strip()) >= LONG_LINE)
    if max(lines.values(), default=0) > MAX_REPEATS:
        reasons.append("repetitive")
    return reasons
