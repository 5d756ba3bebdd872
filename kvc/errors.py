"""The one exception that means: the user can mend this."""


class UserError(ValueError):
    """Bad user input: one sentence naming file, line or key; the CLI prints it and exits with code 2."""


def first_sentence(text: str, limit: int = 200) -> str:
    """The beginning of another library's message, on one line."""
    return " ".join(text.split()).split(". ")[0].rstrip(".")[:limit]
