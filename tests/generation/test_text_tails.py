"""The tail of a row equals the end of the whole row's text, and does not cost the whole row."""

import random

import pytest
from token_kinds import KINDS, decode, load, row

from kvc.errors import UserError
from kvc.generation.tails import TextTails


@pytest.mark.parametrize("kind", KINDS)
def test_tail_is_the_end_of_the_full_text(kind: str) -> None:
    draw = random.Random(1)
    for _ in range(1500):
        characters = draw.randint(1, 40)
        rows = [row(kind, draw, draw.randint(1, 60)) for _ in range(2)] + [[]]
        full = [decode(kind, tokens) for tokens in rows]
        wanted = [text[max(0, len(text) - characters) :] for text in full]
        assert TextTails(load(kind), characters)(rows) == wanted


class Counting:
    """A tokenizer that remembers how much it had to decode."""

    def __init__(self, kind: str) -> None:
        self.tokenizer, self.tokens = load(kind), 0

    def convert_ids_to_tokens(self, token: int) -> str | None:
        return self.tokenizer.convert_ids_to_tokens(token)

    def decode(self, tokens: list[int], **kwargs: bool) -> str:
        self.tokens += len(tokens)
        return self.tokenizer.decode(tokens, **kwargs)


@pytest.mark.parametrize("kind", KINDS)
def test_a_long_row_costs_no_more_than_its_tail(kind: str) -> None:
    tokens = load(kind).encode("The cat saw 12 dogs. " * 500, add_special_tokens=False)
    counting = Counting(kind)
    tails = TextTails(counting, 20)  # type: ignore[arg-type]
    tails([tokens])
    counting.tokens = 0
    assert tails([tokens]) == [decode(kind, tokens)[-20:]]
    assert counting.tokens <= 60


@pytest.mark.parametrize("kind", ["byte_level", "strip"])
def test_endless_broken_characters_end_the_search(kind: str) -> None:
    first = load(kind).encode("\U0001f642", add_special_tokens=False)
    for tokens in ([first[-1]] * 50, [first[-2]] * 50, first[-4:-1] * 20):
        assert TextTails(load(kind), 5)([tokens]) == [decode(kind, tokens)[-5:]]


@pytest.mark.parametrize("kind", KINDS)
def test_no_token_adds_more_characters_than_its_piece_says(kind: str) -> None:
    tails = TextTails(load(kind), 1)
    before = load(kind).encode("a", add_special_tokens=False)
    for token in range(len(load(kind))):
        assert len(decode(kind, [*before, token])) - len(decode(kind, before)) <= tails.piece(token).most


def test_tokens_outside_the_vocabulary_are_no_text() -> None:
    tokens = [*load("byte_level").encode("a cat", add_special_tokens=False), 10**6]
    assert TextTails(load("byte_level"), 3)([tokens]) == ["cat"]


def test_a_tail_of_nothing_is_refused() -> None:
    with pytest.raises(UserError, match="characters"):
        TextTails(load("byte_level"), 0)
