"""The shipped base model: standard files, small, and able to do the tasks."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from kvc.data.language import _items
from kvc.methods.lm.grading import grade

FOLDER = Path(__file__).resolve().parents[1] / "data" / "tiny-lm"


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER)


def test_it_is_a_small_standard_llama_with_grouped_heads(model, tokenizer):
    assert type(model) is LlamaForCausalLM
    assert model.config.num_key_value_heads < model.config.num_attention_heads
    assert model.config.max_position_embeddings >= 4096
    assert len(tokenizer) <= model.config.vocab_size
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) <= 12e6


def test_it_carries_its_training_log():
    log = (FOLDER / "training_log.json").read_text()
    assert "configs/lm/tiny.yaml" in log
    assert "val_loss" in log


@pytest.mark.parametrize(
    "text", ["Natalia sold 48/2 = <<48/2=24>>24 clips.\n#### 72", "é \u00d7 5 € 😀\t\n", "x" * 300]
)
def test_any_text_survives_the_tokenizer(tokenizer, text):
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


@torch.no_grad()
def test_it_solves_held_out_items(model, tokenizer):
    items = _items("test", 7, 12)
    records = grade(model, tokenizer, items, max_new_tokens=300)
    right = sum(record["correct"] for record in records)
    assert len(records) == 72
    assert right >= 65, [(r["group"], r["answer"], r["gold"]) for r in records if not r["correct"]]
