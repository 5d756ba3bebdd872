"""The tokenizer of the tiny model: byte-level BPE in which every number from 0 to 99 is one token.

`python -m kvc.data.synthetic.tokenizer FOLDER` builds it; the same code and seed give the same bytes.
"""

import argparse
import json
import random
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from kvc.data.prompts import SYSTEM
from kvc.data.synthetic.base import Document, document_text
from kvc.data.synthetic.curriculum import FAMILIES, HELPERS, SCHEDULE, draw
from kvc.data.synthetic.example import END_THINK, EOS, THINK, chat, plain
from kvc.data.synthetic.helpers import drill, lookup, repeat, sort
from kvc.data.synthetic.study import study_chat
from kvc.data.synthetic.vocabulary import ALL_WORDS, COMMON_WORDS

PAD, BOS = "<|pad|>", "<|bos|>"
SPECIAL_TOKENS = (PAD, BOS, EOS, THINK, END_THINK)
TASKS = (*HELPERS, *FAMILIES)
NUMBERS = r" ?\d{1,2}"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + '\\n' }}"
    "{% elif message['role'] == 'user' %}{{ 'User: ' + message['content'] + '\\n' }}"
    "{% else %}{{ 'Assistant:\\n' + message['content'] + eos_token + '\\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:\\n' }}"
    "{% if enable_thinking %}{{ '<think>\\n' }}{% endif %}{% endif %}"
)


def sample_text(task: str, rng: random.Random) -> str:
    """The text of one document of a task at full difficulty."""
    helpers: dict[str, Callable[[random.Random], Document]] = {
        "repeat": repeat,
        "lookup": lookup,
        "drill": drill,
        "sort": sort,
    }
    if task in helpers:
        return document_text(helpers[task](rng))
    example = draw(rng, task, SCHEDULE[-1])
    if rng.random() < 0.8:
        return document_text(plain(example))
    talk = study_chat(example) if task == "study" else chat(example, system=SYSTEM if task == "reasoning" else "")
    return document_text(talk).replace(EOS, "")


def _corpus(seed: int, documents: int) -> Iterator[str]:
    """Documents of every task, and lists that make every number and word frequent enough to be merged."""
    rng = random.Random(seed)
    numbers = "".join(f" {i}\n{i}" for i in range(100))
    words = "".join(f" {word}" for word in ALL_WORDS)
    for index in range(documents):
        yield sample_text(TASKS[index % len(TASKS)], rng)
        if index % 10 == 0:
            yield numbers
            yield words
    yield "".join(f" {word}" for word in COMMON_WORDS)


def _train(vocab_size: int, seed: int, documents: int) -> Any:
    """A trained `tokenizers.Tokenizer`."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(NUMBERS), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(seed, documents), trainer)
    # The thinking tags are ordinary text to a reader: decoding without special tokens must keep them.
    state = json.loads(tokenizer.to_str())
    for token in state["added_tokens"]:
        token["special"] = token["content"] in (PAD, BOS, EOS)
    return Tokenizer.from_str(json.dumps(state))


def build_tokenizer(out: Path, vocab_size: int = 1536, seed: int = 0, documents: int = 4000) -> Any:
    """Train the tokenizer and save it as a standard `PreTrainedTokenizerFast` folder.

    Args:
        out: Folder to write; other files in it stay.
        vocab_size: Number of tokens.
        seed: Seed of the training documents.
        documents: Number of training documents.

    Returns:
        The `PreTrainedTokenizerFast`.
    """
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_train(vocab_size, seed, documents),
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == list(range(len(SPECIAL_TOKENS)))
    for number in range(100):
        for text in (f"{number}", f" {number}"):
            assert len(tokenizer(text)["input_ids"]) == 1, f"{text!r} is not one token"
    tokenizer.save_pretrained(out)
    return tokenizer


def tokens_per_word(tokenizer: Any, task: str, documents: int = 200) -> tuple[float, float, int]:
    """How well the tokenizer fits a task.

    Returns:
        Tokens per word (a word is a run of letters, a number of at most two digits, or one other sign; line breaks
        are left out on both sides), mean and largest number of tokens per document.
    """
    rng = random.Random(1)
    texts = [sample_text(task, rng) for _ in range(documents)]
    lengths = [len(tokenizer(text)["input_ids"]) for text in texts]
    words = sum(len(re.findall(r"[A-Za-z]+|\d{1,2}|#+|\n|[^\w\s]+", text)) for text in texts)
    return sum(lengths) / words, sum(lengths) / documents, max(lengths)


def main(argv: list[str]) -> int:
    """Build the tokenizer into a folder and print how well it fits each task."""
    parser = argparse.ArgumentParser(prog="python -m kvc.data.synthetic.tokenizer", description=__doc__)
    parser.add_argument("out", type=Path, help="folder to write")
    tokenizer = build_tokenizer(parser.parse_args(argv).out)
    print(f"{len(tokenizer)} tokens")
    for task in TASKS:
        ratio, mean, largest = tokens_per_word(tokenizer, task)
        print(f"{task:10s} {ratio:.4f} tokens per word, {mean:.0f} tokens per document, at most {largest}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
