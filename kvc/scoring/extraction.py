r"""The final answer of a response: in the last `\boxed{...}`, after `####` or "answer is", else at its end."""

from kvc.data.answers import (
    announced_number,
    announced_words,
    extract_answer,
    final_answer,
    last_boxed,
    normalize_number,
)
from kvc.scoring.equality import Kind


def extract(response: str, kind: Kind) -> str | None:
    r"""Find the answer of a response.

    The last complete `\boxed{...}` (with nested braces) comes first, then what `####` announces, then what follows
    "answer is" or "answer:". Failing these, a number is the last one of the text, an expression the last line, and
    words are the first line.

    Args:
        response: What came after the thinking.
        kind: What the gold answer is; a question for a number is not answered by words.

    Returns:
        A normalised number where the answer is one, else its text; None where there is nothing.
    """
    boxed = last_boxed(response)
    if boxed:
        return normalize_number(boxed) or boxed
    announced = final_answer(response)
    if announced:
        return normalize_number(announced) or announced
    if kind == "number":
        return announced_number(response) or extract_answer(response)
    lines = [line.strip() for line in response.splitlines() if line.strip()]
    if not lines:
        return None
    answer = announced_words(response) or lines[0 if kind == "words" else -1]
    return normalize_number(answer) or answer
