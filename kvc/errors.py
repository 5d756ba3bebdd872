"""The one exception that means: the user can mend this."""


class UserError(ValueError):
    """Bad user input: one sentence naming file, line or key; the CLI prints it and exits with code 2."""
