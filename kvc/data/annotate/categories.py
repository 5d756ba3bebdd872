"""What a piece of reasoning ends with: a result, a conclusion, a fact, the announcement of a step ..."""

import re
from typing import Literal, get_args

from kvc.data.annotate.sentences import sentence_spans

Category = Literal[
    "calculation_result", "intermediate_conclusion", "stated_fact", "setup", "final_answer", "display_math_end", "other"
]
CATEGORIES: tuple[Category, ...] = get_args(Category)

_NUMBER = re.compile(r"\d")
_OPERATION = re.compile(r"\d\s*[-+*/\u00d7\u00f7]\s*\$?\d")
_LATEX_OPEN = r"(?:\\(?:text|mathbf|frac|boxed|dfrac)\s*\{)?"
_EQUALS_NUMBER = re.compile(
    rf"(?:[=\u2248]|\\approx|\bequals\b|\bis equal to\b)[\s\\(${{}}*\[]*{_LATEX_OPEN}[\s\\$*-]*\.?\d", re.IGNORECASE
)
_ITEM = r"[\s*#-]*(?:\d+\.\s*)?"  # the head of a list item or heading
_CONCLUDING = (
    *("so", "thus", "therefore", "hence", "consequently", "as a result", "in total", "altogether", "in conclusion"),
    *("this means", "that means", "which means", "this gives", "this leaves"),
)
_ANNOUNCING = (
    *("keep in mind", "remember", "recall", "note that", "next", "let", "let's", "let us", "now,? (?:we|let)"),
    *("we (?:need|want|must|will|can|have to)", "first,? (?:we|let|i)", "to (?:find|calculate|determine|compute|get)"),
    *("then,? we (?:need|look)", "i (?:need|will)"),
)
_CONCLUSION = re.compile(rf"{_ITEM}(?:{'|'.join(_CONCLUDING)})\b", re.IGNORECASE)
_SETUP = re.compile(rf"{_ITEM}(?:{'|'.join(_ANNOUNCING)})\b", re.IGNORECASE)
_FINAL = re.compile(r"####|\bfinal (?:numerical )?answer\b", re.IGNORECASE)
_DISPLAY_END = re.compile(r"(?:\\\]|\$\$)\s*\Z")


def categorize_sentence(sentence: str) -> Category:
    """The category of one sentence (or line, or equation) by its form."""
    if _FINAL.search(sentence):
        return "final_answer"
    if _DISPLAY_END.search(sentence):
        return "display_math_end"
    if _EQUALS_NUMBER.search(sentence):
        return "calculation_result"
    if _SETUP.match(sentence) or sentence.rstrip().endswith(":"):
        return "setup"
    if _CONCLUSION.match(sentence):
        return "intermediate_conclusion"
    if _NUMBER.search(sentence):
        # A bare "48 + 24" is a calculation too.
        return "calculation_result" if _OPERATION.search(sentence) else "stated_fact"
    return "other"


def categorize(text: str, offset: int) -> Category:
    """The category of what ends at a mark.

    Args:
        text: Reasoning without markers.
        offset: Characters before the mark, as in `Trace.marks`.
    """
    spans = sentence_spans(text[:offset])
    if not spans:
        return "other"
    start, end = spans[-1]
    return categorize_sentence(text[start:end])
