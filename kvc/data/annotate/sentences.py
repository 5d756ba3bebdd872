"""Sentences of mathematical prose: a sentence may span lines, and a line may end a sentence without a full stop."""

import re

# A full stop after a title ends no sentence; after a unit or the like it does, unless the sentence goes on.
_TITLES = {"mr", "mrs", "ms", "dr", "prof", "vs", "e.g", "i.e"}
_SHORT = {*("etc", "approx", "no", "jr", "st", "oz", "lb", "lbs", "ft", "in", "hr", "hrs", "min", "mins", "sec"), "yd"}
_GOES_ON = re.compile(r"\.\s+[a-z0-9=+*/\u00d7\u00f7-]")
_STOP = re.compile(r"[.!?]+[)\"'\u2019\u201d*]*(?=\s|\Z)")
_OPEN_END = re.compile(
    r"(?:[:,;=+*/\u00d7\u00f7(\[-]|\\\\|\\\[|\\times|\\div|\b(?:gives|makes|is|are|equals|has|have|of|to|by|and))\Z"
)
_CONTINUES = re.compile(
    r"[ \t]*(?:[=+*/\u00d7\u00f7)\]]|\\\]|\$\$|-[ \t]*\$?\d+[ \t]*=|(?:so|and|or|but|which|then|that)\b)"
)


def _is_abbreviation(text: str, stop: int) -> bool:
    """Whether the full stop at `stop` belongs to an abbreviation, an initial or the number of a list item."""
    word = re.search(r"(\S+)\Z", text[:stop])
    if word is None:
        return True
    token = word.group(1).lstrip("($\"'*").lower()
    if re.fullmatch(r"\d+", token):
        line = text[text.rfind("\n", 0, stop) + 1 : stop]
        return line.strip("-* \t") == word.group(1).strip("-* \t")
    if token in _TITLES or (len(token) == 1 and text[stop - 1].isupper()):
        return True
    return (token in _SHORT or "." in token) and _GOES_ON.match(text[stop:]) is not None


def sentence_spans(text: str) -> list[tuple[int, int]]:
    """Start and end (after its last visible character) of every sentence, in order.

    A line break ends a sentence unless the line ends in an open sign (`:`, `,`, `=` ...) or the next line continues it
    (an operator, a closing bracket, "so", "which" ...). A blank line always does.
    """
    ends = {
        match.end()
        for match in _STOP.finditer(text)
        if match.group()[0] != "." or not _is_abbreviation(text, match.start())
    }
    for match in re.finditer(r"\s*\n\s*", text):
        before, after = text[: match.start()], text[match.end() :]
        blank_line = match.group().count("\n") > 1
        if blank_line or not (_OPEN_END.search(before) or _CONTINUES.match(after)):
            ends.add(match.start())
    ends.add(len(text.rstrip()))
    spans, start = [], 0
    for end in sorted(ends):
        body = text[start:end]
        if body.strip():
            spans.append((start + len(body) - len(body.lstrip()), end))
        start = max(start, end)
    return spans
