"""A streamer gets from the bridge what `generate` would give it."""

from threading import Thread

import pytest
import torch
from token_kinds import load
from transformers import TextIteratorStreamer, TextStreamer

from kvc.errors import UserError
from kvc.generation.streaming import StreamTo

TEXT = "The cat saw 12 dogs.\nThen it ran."


def feed(stream: StreamTo, prompt: list[int], new: list[int]) -> None:
    stream.put(torch.tensor([prompt]))
    for token in new:
        stream.put(torch.tensor([token]))
    stream.end()


def test_text_is_printed_without_the_prompt(capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = load("byte_level")
    new = tokenizer.encode(TEXT, add_special_tokens=False)
    feed(StreamTo(TextStreamer(tokenizer, skip_prompt=True)), [5, 6, 7], new)
    assert capsys.readouterr().out == f"{TEXT}\n"


def test_text_arrives_in_another_thread() -> None:
    tokenizer = load("byte_level")
    new = tokenizer.encode(TEXT, add_special_tokens=False)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=10)
    thread = Thread(target=feed, args=(StreamTo(streamer), [5], new))
    thread.start()
    assert "".join(streamer) == TEXT
    thread.join()


def test_two_rows_are_refused() -> None:
    stream = StreamTo(TextStreamer(load("byte_level")))
    with pytest.raises(UserError, match=r"streamer: .* 2 rows"):
        stream.put(torch.zeros(2, 5, dtype=torch.int64))
    with pytest.raises(UserError, match=r"streamer: .* 2 rows"):
        stream.put(torch.zeros(2, dtype=torch.int64))
