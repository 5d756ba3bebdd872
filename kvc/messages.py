"""Long messages of the argument parser, cut down to the sentence that helps."""

LIMIT = 400


def one_sentence(message: str) -> str:
    """The heart of a jsonargparse message: which key, and what is wrong with its value.

    The parser reports a failed union or subclass as a tree of attempts; the deepest attempt that got furthest names
    the real culprit.

    Args:
        message: Text of several lines.
    """
    lines = [line.strip(" -\t") for line in message.splitlines() if line.strip(" -\t")]
    if not lines:
        return "bad arguments"
    return " ".join(lines)[:LIMIT]
