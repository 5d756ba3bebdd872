"""Markers by rule: after each finished calculation, conclusion or stated fact of a gold solution; no network."""

import re

from kvc.data.annotate.categories import categorize_sentence
from kvc.data.annotate.sentences import sentence_spans
from kvc.data.traces import MARKER, MAX_MARKS, Trace

# "48/2 = <<48/2=24>>24": the annotation repeats the equation for a calculator, the number follows it.
CALCULATOR = re.compile(r"<<[^<>]*>>")
# Most worth keeping first: what goes when a solution would get too many markers.
PRIORITY = ("calculation_result", "display_math_end", "intermediate_conclusion", "stated_fact")
# A fact that such a sentence follows is the beginning of a calculation and not a step of its own.
_CARRIES_ON = re.compile(r"(?:this|that|which|it) (?:gives|makes|is|means|equals|leaves)\b", re.IGNORECASE)
_FINAL_LINE = re.compile(r"^.*####", re.MULTILINE)


class RulesAnnotator:
    """Marks the ends of finished steps.

    A marker goes to the end of a sentence, so never inside a number, an equation or a `<<...>>` annotation (those are
    removed from the marked text and stay in `original_reasoning`). The line with `####`, and all after it, gets none.

    Args:
        max_marks: Largest number of markers; facts are given up first, then conclusions.
    """

    name = "rules"

    def __init__(self, max_marks: int = MAX_MARKS) -> None:
        self.max_marks = max_marks

    def marks(self, text: str) -> list[int]:
        """Offsets in `text` (without calculator annotations) after which a marker belongs, ascending."""
        final = _FINAL_LINE.search(text)
        body = text[: final.start()] if final else text
        spans = sentence_spans(body)
        found: list[tuple[int, int]] = []
        for index, (start, end) in enumerate(spans):
            category = categorize_sentence(body[start:end])
            if category not in PRIORITY:
                continue
            following = body[spans[index + 1][0] :] if index + 1 < len(spans) else ""
            if category == "stated_fact" and _CARRIES_ON.match(following):
                continue
            found.append((PRIORITY.index(category), end))
        kept = sorted(found, key=lambda item: item[0])[: self.max_marks]
        return sorted(end for _, end in kept)

    def annotate(self, question: str, answer: str, reasoning: str) -> Trace:
        """A trace for one gold solution; a missing last line `#### N` is added.

        Args:
            question: The problem.
            answer: The gold answer.
            reasoning: The gold solution, with or without `<<...>>`.
        """
        text = re.sub(r"[ \t]+(?=\n|\Z)", "", CALCULATOR.sub("", reasoning)).rstrip()
        if "####" not in text:
            text = f"{text}\n#### {answer}".lstrip()
        pieces, start = [], 0
        for end in self.marks(text):
            pieces.append(text[start:end])
            start = end
        marked = f" {MARKER}".join([*pieces, text[start:]])
        return Trace(question, marked, answer, reasoning, {"annotator": self.name})
