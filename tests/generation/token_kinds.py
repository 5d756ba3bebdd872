"""Tokenizers of the kinds that decode differently, and random rows for them."""

import random
from functools import cache
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parents[2]
KINDS = ("byte_level", "strip", "metaspace", "gemma", "wordpiece")
SYMBOLS = list("abcdefgh.,-\n0123456789\u00e9\u4f60\U0001f642 ")
WORDS = [
    "\u2581",
    "\u2581\u2581",
    "\u2581the",
    "\u2581a",
    "ing",
    "---",
    "\u2581Wait",
    "e\u2581f",
    "\u2581\u2581\u2581x",
]
DECODERS = {
    "strip": [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)],
    "metaspace": [decoders.ByteFallback(), decoders.Metaspace()],
    "gemma": [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()],
    "wordpiece": [decoders.WordPiece()],
}


@cache
def load(kind: str) -> PreTrainedTokenizerBase:
    """The tokenizer of data/tiny-lm, or a small one with a vocabulary like SentencePiece's."""
    if kind == "byte_level":
        return AutoTokenizer.from_pretrained(ROOT / "data" / "tiny-lm")
    names = [f"<0x{byte:02X}>" for byte in range(256)] if kind != "wordpiece" else ["##ing", "##.", "##s"]
    names = ["<unk>", *names, *(symbol for symbol in SYMBOLS if symbol not in "\U0001f642 "), *WORDS]
    backend = Tokenizer(models.Unigram([(name, -1.0) for name in names], unk_id=0, byte_fallback=kind != "wordpiece"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence(DECODERS[kind])
    backend.add_special_tokens([AddedToken("</s>", special=True)])
    backend.add_tokens([AddedToken("</think>"), AddedToken("<think> ")])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


def row(kind: str, draw: random.Random, length: int) -> list[int]:
    """Token ids of random text, of random tokens, or both; half of the rows have many bytes in a row."""
    tokenizer = load(kind)
    text = "".join(draw.choices([*SYMBOLS, "</think>", "\u4f60\u597d\U0001f642"], k=length))
    written = tokenizer.encode(text, add_special_tokens=False)
    anything = [draw.randrange(len(tokenizer)) for _ in range(length)]
    byte = tokenizer.encode("\U0001f642\u20ac", add_special_tokens=False)
    wild = [draw.choice(byte) if draw.random() < 0.8 else token for token in anything]
    at = draw.randrange(length)
    return draw.choice([written, anything, wild, written[:at] + wild[at:], wild[:at] + written[at:]])[:length]


def decode(kind: str, tokens: list[int]) -> str:
    """The slow way."""
    return load(kind).decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)
