from itertools import pairwise
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from kvc.data.prompts import render_prompt
from kvc.data.synthetic.base import Segment, rng_for
from kvc.data.synthetic.curriculum import Mixture
from kvc.data.synthetic.tokenizer import TASKS, build_tokenizer, tokens_per_word
from kvc.data.tokens import tokenize
from kvc.errors import UserError

FOLDER = Path(__file__).parents[2] / "data/tiny-lm"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER)


def test_shipped_tokenizer_is_what_the_code_builds(tmp_path):
    build_tokenizer(tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() == (FOLDER / "tokenizer.json").read_bytes()


def test_numbers_are_single_tokens(tokenizer):
    texts = [f"{space}{number}" for number in range(100) for space in ("", " ")]
    assert [len(tokenizer(text)["input_ids"]) for text in texts] == [1] * 200


def test_special_tokens(tokenizer):
    assert tokenizer.convert_ids_to_tokens(range(5)) == ["<|pad|>", "<|bos|>", "<|eos|>", "<think>", "</think>"]
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert len(tokenizer) == 1515


@pytest.mark.parametrize(
    "text", ["héllo  \n\n 日本 🎉 \t x ,y .", " isn't . 1234 12.5 ", "\x00\r\n", "<think> a </think>", "#### 7"]
)
def test_any_text_round_trips(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


@pytest.mark.parametrize("task", TASKS)
def test_one_token_per_word(tokenizer, task):
    assert tokens_per_word(tokenizer, task, documents=50)[0] < 1.01


def test_no_token_holds_characters_of_two_kinds(tokenizer):
    for index in range(100):
        document = Mixture().document(rng_for("cut", "train", 0, index), index / 100)
        tokens = tokenize(tokenizer, document)
        position = 0
        for segment, following in pairwise(document):
            position += len(segment.text)
            assert segment.kind == following.kind or position in tokens.ends
        assert len(tokens.ids) == len(tokens.ends) == len(tokens.kinds)


def test_a_token_has_the_kind_of_its_segment(tokenizer):
    document = [Segment("List: Emma", "context"), Segment(" Paris", "answer"), Segment("; 12 ", "context")]
    assert tokenize(tokenizer, document).kinds == ["context"] * 3 + ["answer"] + ["context"] * 3


def test_prompts(tokenizer):
    assert render_prompt("Why?") == "Question: Why?\nSolution:\n"
    chat = render_prompt("Why?", "chat", tokenizer)
    assert chat.endswith("User: Why?\nAssistant:\n")
    assert chat.count("####") == 1
    with pytest.raises(UserError, match="chat template"):
        render_prompt("Why?", "chat")
    with pytest.raises(UserError, match="'fancy'"):
        render_prompt("Why?", "fancy")
