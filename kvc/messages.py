"""Long messages of the argument parser, cut down to the sentence that helps."""

import re
from collections.abc import Iterable
from difflib import get_close_matches
from textwrap import dedent

LIMIT = 300
KEYED = re.compile(r"[\w.]+: ")
UNKNOWN = re.compile(r"(-*)([\w.-]+): unknown (?:key|option)")
HEADS = (
    (re.compile(r'Parser key "([^"]+)":? *\n*'), None),
    (re.compile(r"Problem with given class_path '([^']+)(?<!\.yaml)': *\n*"), "class_path {}"),
    (re.compile(r"Unable to load config '([^']+)' *\n* *(?=-)"), "file {}"),
)
"""What a tree of messages hangs under; its name is the key itself, or is made from the group."""
LEAVES = (
    (r"(?:Subcommand|Group) '[^']+' does not accept option '([^']+)'", r"\1: unknown key"),
    (r"Option '([^']+)' is not accepted", r"\1: unknown key"),
    (r"unrecognized arguments: ([^\s=]+).*", r"\1: unknown option"),
    (r"the following arguments are required: (?:fit|validate|test|predict)\.(\S+)", r"\1: missing"),
    (r"Problem with given class_path '([^']+\.yaml)': .*", r"there is no file \1"),
    (r"(?:Expected a dot import path string|Unexpected import path format): (.*)", r"there is no class or file \1"),
    (r"Import path (\S+) does not correspond to a subclass of (\S+)", r"\1 is not a \2"),
    (r"Not a valid subclass of (\w+)\b.*", r"expected the settings of a \1"),
    (r'Unable to load config "([^"]+)"', r"cannot read the file \1"),
    (r"File does not exist: '([^']+)'", r"there is no file \1"),
    (r"Call to compute_fn of link .* failed: ", ""),
    (r'\s*in "<[^>]+>", (line \d+), column \d+', r" (\1)"),
    (r"\bExpected an? ", "expected "),
    (r"\. Got value: ", ", got "),
    (r"<class 'NoneType'>", "null"),
    (r"<class '(?:[\w.]+\.)?(\w+)'>", r"\1"),
    (r"typing\.Literal\[([^\]]*)\]", r"one of \1"),
)


def one_sentence(message: str, known: Iterable[str] = ()) -> str:
    """The heart of a jsonargparse message: which key, and what is wrong with its value.

    The parser reports a failed union as a tree of attempts under the keys that lead to it. The keys are joined with
    dots; of the attempts, one that found an error inside the value says more than one that expected another type.

    Args:
        message: Text of several lines.
        known: Keys that exist where the error was found, to suggest one for a key that does not.
    """
    text = _reduce(message) or "bad arguments"
    if unknown := UNKNOWN.fullmatch(text):
        others = [key for key in known if not unknown[2].startswith(f"{key}.")]
        similar = get_close_matches(unknown[2], others, n=1, cutoff=0.7)
        text += f" (did you mean {unknown[1]}{similar[0]}?)" if similar else ""
    return text if len(text) <= LIMIT else f"{text[: LIMIT - 3]}..."


def _reduce(text: str) -> str:
    text = dedent(text).strip("\n")
    for pattern, name in HEADS:
        if head := pattern.match(text):
            return _under(head[1], name, _reduce(text[head.end() :]))
    attempts, value = _attempts(text)
    if not attempts:
        return _leaf(text)
    inside = [attempt for attempt in attempts if not attempt.startswith("expected ")]
    if inside:
        return next((attempt for attempt in inside if KEYED.match(attempt)), inside[0])
    kinds = list(dict.fromkeys(attempt.removeprefix("expected ") for attempt in attempts))
    return f"expected {' or '.join(kinds)}" + (f", got {value}" if value else "")


def _under(key: str, name: str | None, text: str) -> str:
    """`text` below `key`: a dotted key if it starts with one itself."""
    if name is None:
        text = re.sub(r"^--([\w.]+: unknown) option", r"\1 key", text)
        if text.startswith((f"{key}.", f"{key}: ")):
            return text
        return f"{key}.{text}" if KEYED.match(text) else f"{key}: {text}"
    return text if KEYED.match(text) else f"{name.format(key)}: {text}"


def _attempts(text: str) -> tuple[list[str], str]:
    """The alternatives that were tried at the top level of a tree, each reduced, and the value they were given."""
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.strip() == "Errors:"), None)
    if start is None:
        items, value = (text, "") if text.startswith("- ") else ("", "")
    else:
        indent = lines[start][: -len("Errors:")]
        end = next((i for i, line in enumerate(lines) if line.startswith(f"{indent}Given value type:")), len(lines))
        items = dedent("\n".join(lines[start + 1 : end]))
        value = " ".join(" ".join(lines[end + 1 :]).removeprefix(f"{indent}Given value:").split())
    attempts = [first + "\n" + dedent(rest) for first, _, rest in (p.partition("\n") for p in _split(items))]
    return [_reduce(attempt) for attempt in attempts], value


def _split(items: str) -> list[str]:
    return [piece for piece in re.split(r"(?m)^- ", items) if piece.strip()]


def _leaf(text: str) -> str:
    text = " ".join(text.split())
    for pattern, replacement in LEAVES:
        text = re.sub(pattern, replacement, text)
    return text
