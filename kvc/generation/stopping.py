"""Stop strings: the end of a row's decoding by its text."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from kvc.errors import UserError
from kvc.generation.tails import MISSING, TextTails


class StopStrings:
    """Stops a row as soon as its new text contains one of some strings.

    A string may straddle tokens, and the token that completes it may carry more text behind it: `---` is seen in
    `----`, and in a token `---` that ends with a newline. Only new text counts: a string that began in the prompt is
    not seen. A character of which only some bytes are there is not there yet.

    White space counts as it is written. A string that ends with white space is seen only with that white space, which
    many tokenizers put into the next token, so one token later than without: `8. ` does not stop before the 5 of
    `8.5`. Write `8.` to stop there too.

    Args:
        strings: Any of these stops a row.
        tokenizer: Tokenizer of the new tokens.
        delay: Tokens that a row still gets after the one that completed a string.

    Raises:
        UserError: If there is no string, an empty one or one with `U+FFFD`, or if `delay` is negative.
    """

    def __init__(self, strings: Sequence[str], tokenizer: PreTrainedTokenizerBase, delay: int = 0) -> None:
        if isinstance(strings, str):
            raise UserError(f"strings: a list of stop strings is needed, got the one string {strings!r}")
        if not strings:
            raise UserError("strings: at least one stop string is needed, got none")
        for string in strings:
            # Bytes without a character look like this until the rest arrives, so a match would come too early.
            if not string or MISSING in string:
                raise UserError(
                    f"strings: {string!r} cannot be a stop string: it needs characters, and none may be U+FFFD"
                )
        if delay < 0:
            raise UserError(f"delay: it counts tokens after a stop string and cannot be negative, got {delay}")
        self.strings, self.delay = tuple(strings), delay
        self._longest = max(len(string) for string in self.strings)
        self._tails = TextTails(tokenizer, self._longest)
        self._seen: list[int] = []
        self._found: list[int | None] = []

    def reset(self, rows: int) -> None:
        """Forget all rows and start with `rows` new ones, which have no tokens yet."""
        self._seen = [0] * rows
        self._found = [None] * rows

    def __call__(self, tokens: Sequence[Sequence[int]]) -> list[bool]:
        """Look at what was added since the last call.

        Args:
            tokens: New token ids of each row since its start, without the prompt.

        Returns:
            For each row whether it stops; a row that stopped keeps saying so.
        """
        assert len(tokens) == len(self._seen), f"{len(tokens)} rows after reset({len(self._seen)})"
        for number, row in enumerate(tokens):
            if self._found[number] is None and len(row) > self._seen[number] and self._completed(row, number):
                self._found[number] = len(row)
            self._seen[number] = len(row)
        return [
            found is not None and len(row) >= found + self.delay for row, found in zip(tokens, self._found, strict=True)
        ]

    def cut(self, text: str) -> str:
        """The text before the stop string that starts first; all of it if there is none."""
        starts = [start for string in self.strings if (start := text.find(string)) >= 0]
        return text[: min(starts)] if starts else text

    def _completed(self, row: Sequence[int], number: int) -> bool:
        """Whether the tokens not seen yet complete a string.

        A string that was not there before ends in the new text, so all but its last character may be old.
        """
        new = sum(self._tails.piece(token).most for token in row[self._seen[number] :])
        text = self._tails.tail(row, self._longest - 1 + new)
        return any(string in text for string in self.strings)
