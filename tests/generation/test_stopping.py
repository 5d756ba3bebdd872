"""A row stops at the first token after which its new text contains a stop string."""

import random

import pytest
from token_kinds import KINDS, decode, load, row

from kvc.errors import UserError
from kvc.generation.stopping import StopStrings


def ids(text: str, kind: str = "byte_level") -> list[int]:
    return load(kind).encode(text, add_special_tokens=False)


def steps_to_stop(stop: StopStrings, tokens: list[int]) -> int | None:
    """Tokens that were there when the row stopped."""
    stop.reset(1)
    return next((n for n in range(len(tokens) + 1) if stop([tokens[:n]])[0]), None)


def slow(strings: list[str], tokens: list[int], kind: str) -> int | None:
    for n in range(len(tokens) + 1):
        text = decode(kind, tokens[:n]).rstrip("\ufffd")
        if any(string in text for string in strings):
            return n
    return None


def pieces(text: str, draw: random.Random) -> list[str]:
    """Stop strings out of a text, or near misses of such."""
    found = []
    for _ in range(draw.randint(1, 3)):
        at = draw.randrange(len(text))
        string = text[at : at + draw.randint(1, 12)] + draw.choice(["", "", "", "~", " "])
        found.append(string)
    return [string for string in found if "\ufffd" not in string] or ["never"]


@pytest.mark.parametrize("kind", KINDS)
def test_stops_where_the_full_text_first_contains_a_string(kind: str) -> None:
    draw = random.Random(2)
    stopped = 0
    for _ in range(400):
        tokens = row(kind, draw, draw.randint(5, 40))
        strings = pieces(decode(kind, tokens), draw)
        wanted = slow(strings, tokens, kind)
        assert steps_to_stop(StopStrings(strings, load(kind)), tokens) == wanted, (tokens, strings)
        stopped += wanted is not None
    assert stopped > 100


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_get_several_tokens_at_once(kind: str) -> None:
    draw = random.Random(3)
    for _ in range(200):
        tokens, step = row(kind, draw, draw.randint(5, 40)), draw.randint(2, 9)
        strings = pieces(decode(kind, tokens), draw)
        stop = StopStrings(strings, load(kind))
        stop.reset(1)
        got = [stop([tokens[:n]])[0] for n in range(0, len(tokens), step)]
        texts = [decode(kind, tokens[:n]).rstrip("\ufffd") for n in range(0, len(tokens), step)]
        first = next((i for i, text in enumerate(texts) if any(s in text for s in strings)), len(texts))
        assert got == [i >= first for i in range(len(texts))]


def test_string_over_tokens_and_text_behind_it() -> None:
    straddle = ids("wait</think>done")
    assert (
        steps_to_stop(StopStrings(["t</think>d"], load("byte_level")), straddle) == len(straddle) - len(ids("done")) + 1
    )
    tokenizer = load("strip")
    dashes = [tokenizer.convert_tokens_to_ids(name) for name in ("a", "---", "---")]
    assert steps_to_stop(StopStrings(["a--"], tokenizer), dashes) == 2
    assert steps_to_stop(StopStrings(["----"], tokenizer), dashes) == 3


def test_white_space_counts_as_written() -> None:
    tokens = ids("8.5 and 8. The")
    text = decode("byte_level", tokens[: steps_to_stop(StopStrings(["8. "], load("byte_level")), tokens)])
    assert text.startswith("8.5 and 8. ")
    text = decode("byte_level", tokens[: steps_to_stop(StopStrings(["8."], load("byte_level")), tokens)])
    assert text == "8."


def test_a_character_stops_when_its_last_byte_is_there() -> None:
    for kind in ("byte_level", "strip"):
        tokens = ids("a\U0001f642", kind)
        assert len(tokens) == 5
        assert steps_to_stop(StopStrings(["\U0001f642"], load(kind)), tokens) == len(tokens)


def test_delay_counts_tokens_of_the_row_itself() -> None:
    tokens = ids("one two---three four five six")
    first = slow(["---"], tokens, "byte_level")
    assert first is not None
    for delay in range(4):
        assert steps_to_stop(StopStrings(["---"], load("byte_level"), delay), tokens) == first + delay
    stop = StopStrings(["---"], load("byte_level"), delay=2)
    stop.reset(2)
    got = [stop([tokens[: first + min(n, 1)], tokens[: n + 1]]) for n in range(first + 4)]
    assert [row for row, _ in got] == [False] * (first + 4)
    assert [row for _, row in got] == [n + 1 >= first + 2 for n in range(first + 4)]


def test_rows_have_their_own_state_and_reset_forgets_it() -> None:
    stop = StopStrings(["</think>"], load("byte_level"))
    stop.reset(3)
    a, b = ids("a</think>b"), ids("abc abc abc")
    assert stop([a, b, []]) == [True, False, False]
    assert stop([a, [*b, *a], b]) == [True, True, False]
    stop.reset(3)
    assert stop([[], b, a]) == [False, False, True]
    with pytest.raises(AssertionError):
        stop([a])


def test_cut_keeps_the_text_before_the_first_string() -> None:
    stop = StopStrings(["---", "END", "bc"], load("byte_level"))
    assert stop.cut("a---b---END") == "a"
    assert stop.cut("xEND---") == "x"
    assert stop.cut("--- ") == ""
    assert stop.cut("nothing--") == "nothing--"


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        ({"strings": []}, "strings"),
        ({"strings": ["a", ""]}, "strings"),
        ({"strings": "---"}, "strings"),
        ({"strings": ["\ufffd"]}, "strings"),
        ({"strings": ["a"], "delay": -1}, "delay"),
    ],
)
def test_bad_settings_name_their_key(arguments: dict, key: str) -> None:
    with pytest.raises(UserError, match=key):
        StopStrings(tokenizer=load("byte_level"), **arguments)
