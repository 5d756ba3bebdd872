"""Whether two answers mean the same: by value, as text, or as expressions."""

import re
from functools import lru_cache
from typing import Literal

from kvc.data.answers import normalize_number, same_answer

Kind = Literal["number", "expression", "words"]
_TEXT = re.compile(r"\\(?:text|mathrm|mbox|textbf|mathbf|operatorname)\s*\{[^{}]*\}")
_COMMAND = re.compile(r"\\[a-zA-Z]+")
_WORD = re.compile(r"[^\W\d_]{3,}|\d:\d")
_MATHS = re.compile(r"[\d\\^=+*/<>]|^\W*[^\W\d_]\W*$")
_FUNCTIONS = {"sqrt", "sin", "cos", "tan", "cot", "sec", "csc", "log", "exp", "max", "min", "inf", "gcd", "lcm", "deg"}
_DELIMITERS = re.compile(r"^(?:\$+|\\\(|\\\[)\s*|\s*(?:\$+|\\\)|\\\])$")


def kind_of(answer: str) -> Kind:
    """What an answer is: a number with an optional unit, an expression, or words.

    Words are never compared as expressions, in which `Room 5` would be a product of five factors, in any order.
    """
    if normalize_number(answer) is not None:
        return "number"
    maths = _TEXT.sub(" ", answer)
    words = {word.lower() for word in _WORD.findall(_COMMAND.sub(" ", maths))} - _FUNCTIONS
    return "expression" if not words and _MATHS.search(maths) else "words"


def same(answer: str | None, gold: str) -> bool:
    r"""Whether an answer is right: `016` is `16`, `\frac{1}{2}` is `1/2` is `0.5`, `x^2+1` is `1+x^2`.

    Two numbers are compared by value, words without regard to case and spaces, everything else by `math_verify`.

    Args:
        answer: What was extracted; None is never right.
        gold: The right answer.
    """
    if answer is None or not answer.strip():
        return False
    if same_answer(answer, gold) or _folded(answer) == _folded(gold):
        return True
    kinds = {kind_of(answer), kind_of(gold)}
    return "words" not in kinds and kinds != {"number"} and _equal_expressions(answer, gold)


def _folded(text: str) -> str:
    return " ".join(_bare(text).casefold().split()).rstrip(".")


def _bare(text: str) -> str:
    """Without the signs between which LaTeX sets formulas."""
    return _DELIMITERS.sub("", text.strip())


@lru_cache(maxsize=100_000)
def _equal_expressions(answer: str, gold: str) -> bool:
    from math_verify import parse, verify

    wanted, found = (parse(f"${_bare(text).replace('**', '^')}$") for text in (gold, answer))
    return bool(wanted and found and verify(wanted, found))
