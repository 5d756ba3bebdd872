"""Final answers: find them in a completion, bring them to one form, compare them."""

import re
from fractions import Fraction

_NUMBER = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+"
_SIGNED = rf"(?:(?<![\w.)])-)?(?:{_NUMBER})"
_CURRENCY = r"[$€£¥]"
_MIXED = re.compile(r"(-?)(\d+) (\d+)/(\d+)")
_FRACTION = re.compile(rf"({_SIGNED})\s*/\s*({_NUMBER})")
_PLAIN = re.compile(_SIGNED)
_FINAL = re.compile(r"####[ \t]*:?(.*?)(?=####|\Z)", re.DOTALL)
_LATEX_FRACTION = re.compile(r"\\[dt]?frac\s*(?:\{([^{}]+)\}|(\d))\s*(?:\{([^{}]+)\}|(\d))")
_ANNOUNCED = re.compile(r"\banswer(?:\s+is\b|\s*(?:\*\*|__)?\s*[:=])\s*:?", re.IGNORECASE)
_SCALES = {"thousand": 10**3, "million": 10**6, "billion": 10**9}
_LATEX_TEXT = re.compile(r"\\(?:text|mathrm|mbox|textbf|mathbf)\s*\{([^{}]*)\}")
_LATEX_SPACE = re.compile(r"\\(?:left|right|displaystyle|[,;:! ()\[\]])")


def _plain(text: str) -> str:
    """Text without LaTeX wrapping, Markdown emphasis, currency signs and the like."""
    text = _LATEX_SPACE.sub("", text.replace("\\$", "$").replace("\\%", "%").replace("{,}", ","))
    text = re.sub(r"(?<=\d)(?=\\[dt]?frac)", " ", text)
    text = _LATEX_TEXT.sub(r" \1 ", _LATEX_FRACTION.sub(r"\1\2/\3\4", text))
    text = re.sub(r"\^\s*\{?\\circ\}?|°", "", text)
    text = re.sub(rf"{_CURRENCY}|\*\*|__|`", "", text)
    return re.sub(r"[\u2212\u2013]", "-", text).strip()


def _leading_number(text: str) -> tuple[Fraction, str] | None:
    """The number a plain text starts with, and what follows it."""
    text = re.sub(r"^-\s+(?=[\d.])", "-", text.lstrip("=≈~:([{ \n\t"))
    for pattern in (_MIXED, _FRACTION, _PLAIN):
        found = pattern.match(text)
        if not found:
            continue
        tail = text[found.end() :]
        try:
            if pattern is _MIXED:
                sign, whole, top, bottom = found.groups()
                value = int(whole) + Fraction(int(top), int(bottom))
                return (-value if sign else value), tail
            if pattern is _FRACTION:
                top, bottom = (Fraction(group.replace(",", "")) for group in found.groups())
                return top / bottom, tail
            return Fraction(found.group().replace(",", "")), tail
        except ZeroDivisionError:
            return None
    return None


def _number(text: str) -> tuple[Fraction, int] | None:
    """The value of a text that is one number with an optional unit, and the scale that unit may mean.

    None for expressions and lists. The scale is 1 except for "192 million", which some call 192 and some 192,000,000.
    """
    first_line = _plain(text).split("\n", 1)[0]
    found = _leading_number(first_line)
    if found is None:
        return None
    value, tail = found
    # "9 + x", "3, 4", "5x" and "3:30" are not numbers, "9 cm", "9%." and "9ml" are.
    if re.match(r"\s*(?:[-+*/^=\u00d7\u00f7\\_]|[<>]\s*[\d=]|,\s*[-\d]|:\d|[eE]\d|[xyzn]\b|\d)", tail):
        return None
    word = re.match(r"\s*(\w+)", tail)
    return value, _SCALES.get(word.group(1).lower(), 1) if word else 1


def _canonical(value: Fraction) -> str:
    """Digits for whole numbers, a decimal where it is finite, `p/q` otherwise."""
    rest = value.denominator
    for prime in (2, 5):
        while rest % prime == 0:
            rest //= prime
    if rest != 1:
        return f"{value.numerator}/{value.denominator}"
    digits = 0
    while (value * 10**digits).denominator != 1:
        digits += 1
    scaled = abs(value.numerator * 10**digits // value.denominator)
    sign = "-" if value < 0 else ""
    text = str(scaled).rjust(digits + 1, "0")
    return sign + (f"{text[:-digits]}.{text[-digits:]}" if digits else text)


def normalize_number(text: str) -> str | None:
    r"""One form for one value: `"$1,234.00"` and `"1234 dollars"` give `"1234"`, `"\frac{1}{2}"` gives `"0.5"`.

    Returns:
        Whole numbers as digits, finite decimals without trailing zeros, other fractions as `p/q`; None when the text
        is not a number with an optional unit.
    """
    found = _number(text)
    return None if found is None else _canonical(found[0])


def final_answer(text: str) -> str | None:
    """What the last `####` of a text announces; None without `####`.

    The number may stand on the next line. "48 slices ####" at the very end counts too: some models swap the two.

    Returns:
        The announced words as they are (`"$192 million"`), when they are a number; otherwise the one line after the
        last `####`, or None if there is no such line.
    """
    found = [match.group(1).strip().lstrip(":").strip() for match in _FINAL.finditer(text)]
    for announced in reversed(found):
        # A heading ("#### Step 3: ...") announces no number.
        if normalize_number(announced) is not None:
            return announced.split("\n", 1)[0]
    if not found:
        return None
    if not found[-1]:
        last_line = text.rstrip("# \n").rsplit("\n", 1)[-1]
        numbers = set(_PLAIN.findall(_plain(last_line)))
        return numbers.pop() if len(numbers) == 1 else None
    return found[-1] if "\n" not in found[-1] else None


def last_boxed(text: str) -> str | None:
    r"""The content of the last complete `\boxed{...}`, with nested braces; None if there is none."""
    for start in reversed([match.end() for match in re.finditer(r"\\f?boxed\s*\{", text)]):
        depth = 1
        # An escaped brace is a character of a set, and may have no partner: \left\{ ... \right.
        for brace in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, start):
            depth += {"{": 1, "}": -1}.get(brace.group(), 0)
            if depth == 0:
                return text[start : brace.start()].strip()
    return None


def announced_number(text: str) -> str | None:
    """The number after the last "answer is" or "answer:" that a number follows, normalised; None without one."""
    ends = [match.end() for match in _ANNOUNCED.finditer(text)]
    found = (normalize_number(text[end : end + 200].lstrip()) for end in reversed(ends))
    return next((number for number in found if number is not None), None)


def announced_words(text: str) -> str | None:
    """The rest of the line after the last "answer is" or "answer:", without a full stop; None without one."""
    found = [text[match.end() :].strip().split("\n", 1)[0] for match in _ANNOUNCED.finditer(text)]
    words = [line.strip("*_ ").rstrip(".").strip("*_ ") for line in found]
    return next((line for line in reversed(words) if line), None)


def extract_answer(completion: str) -> str | None:
    r"""The answer of a completion: after the last `####`, else the last `\boxed{...}`, else the last number.

    Returns:
        A normalised number where the answer is one, its text otherwise, None if there is nothing to extract.
    """
    answer = final_answer(completion)
    if answer is not None and (number := normalize_number(answer)) is not None:
        return number
    boxed = last_boxed(completion)
    if boxed is not None:
        return normalize_number(boxed) or boxed
    if answer is not None:
        return answer
    numbers = _PLAIN.findall(_plain(completion))
    return normalize_number(numbers[-1]) if numbers else None


def same_answer(a: str | None, b: str | None) -> bool:
    """Whether two answers mean the same: equal values, or equal text once spaces and LaTeX wrapping are gone."""
    if a is None or b is None:
        return False
    left, right = _number(a), _number(b)
    if left is not None and right is not None:
        return bool({left[0], left[0] * left[1]} & {right[0], right[0] * right[1]})
    if left is not None or right is not None:
        return False
    return re.sub(r"\s+", "", _plain(a)).rstrip(".") == re.sub(r"\s+", "", _plain(b)).rstrip(".")
