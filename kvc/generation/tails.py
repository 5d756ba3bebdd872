"""The end of each row's text, decoded without decoding the whole row."""

import re
from collections.abc import Sequence
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from kvc.errors import UserError

MISSING = "\ufffd"
"""What a decoder writes for bytes that are not a character (yet)."""
BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
SLACK = 4


class Piece(NamedTuple):
    """What is known of one token by itself.

    Attributes:
        anchor: Characters that it decodes to, if text may be cut before it; else 0.
        most: The most characters that it can add to a text.
    """

    anchor: int
    most: int


class TextTails:
    r"""Decodes the last characters of every row.

    A row is cut before an *anchor*: a token that by itself decodes to whole characters. Its text is thrown away, and
    what follows it is exact: spaces that a decoder drops at the start of a text are lost from the anchor; an anchor
    starts and ends on the border of a character; and it is no `<0x41>` token, since a decoder with byte fallback turns
    a whole run of those into `\ufffd` when one of them is wrong. The cut moves to the left until enough text follows
    it, so a tail costs more after a long run of tokens that are parts of characters, at worst the whole row.

    Args:
        tokenizer: A fast tokenizer.
        characters: How many characters at the end of each row are wanted.

    Raises:
        UserError: If `characters` is below 1.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, characters: int) -> None:
        if characters < 1:
            raise UserError(f"characters: a tail needs at least 1, got {characters}")
        self.tokenizer, self.characters = tokenizer, characters
        self._pieces: dict[int, Piece] = {}

    def __call__(self, tokens: Sequence[Sequence[int]]) -> list[str]:
        """The end of every row's text.

        Args:
            tokens: Token ids of each row.

        Returns:
            For each row the last `characters` characters of its decoded text, special tokens included; the whole text
            if it is shorter. A character of which only the first bytes are there ends the text as `U+FFFD`.
        """
        return [self.tail(row, self.characters) for row in tokens]

    def tail(self, row: Sequence[int], characters: int) -> str:
        """The last `characters` characters of one row's text, or all of it if it is shorter."""
        size = characters // 2 + SLACK
        while (start := self._anchor(row, len(row) - size)) >= 0:
            text = self._decode(row[start:])[self.piece(row[start]).anchor :]
            if len(text) >= characters:
                return text[len(text) - characters :]
            size = 2 * (len(row) - start)
        text = self._decode(row)
        return text[max(0, len(text) - characters) :]

    def piece(self, token: int) -> Piece:
        """What is known of a token by itself; looked up once."""
        if token not in self._pieces:
            name = self.tokenizer.convert_ids_to_tokens(token) or ""
            text = self._decode([token])
            whole = bool(text) and MISSING not in text and not BYTE_TOKEN.fullmatch(name)
            # One more than the symbols of its name: some decoders write a space between tokens.
            self._pieces[token] = Piece(len(text) if whole else 0, len(name) + 1)
        return self._pieces[token]

    def _anchor(self, row: Sequence[int], last: int) -> int:
        """Index of the nearest anchor at or before `last`; -1 if there is none."""
        return next((at for at in range(last, -1, -1) if self.piece(row[at]).anchor), -1)

    def _decode(self, row: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(row), skip_special_tokens=False, clean_up_tokenization_spaces=False))
