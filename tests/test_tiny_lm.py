"""The shipped base model: standard files, small, and able to do the tasks."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from kvc.data.language import Item
from kvc.data.synthetic.tasks import TASKS, example
from kvc.methods.lm.grading import grade
from kvc.methods.lm.teacher_forcing import score

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
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
    assert "val/loss" in log


@pytest.mark.parametrize(
    "text", ["Natalia sold 48/2 = <<48/2=24>>24 clips.\n#### 72", "é \u00d7 5 € 😀\t\n", "x" * 300]
)
def test_any_text_survives_the_tokenizer(tokenizer, text):
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


@pytest.mark.parametrize("source", ["gsm8k/gsm8k_compressed_train.json", "squad"])
def test_real_text_survives_the_tokenizer(tokenizer, source):
    path = SHARED / source
    if not path.exists():
        pytest.skip("no shared data beside this checkout")
    files = [path] if path.is_file() else sorted(path.glob("**/*.json"))
    text = files[0].read_text()[:200_000]
    assert len(text) > 10_000
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


# Far below what the report measures, far above what a model without the context gets.
FLOORS = {
    "reasoning": 0.8,
    "passages": 0.9,
    "documents": 0.7,
    "in_context": 0.6,
    "dialogue": 0.6,
    "personalisation": 0.9,
    "study": 0.9,
}


@pytest.mark.parametrize("task", TASKS)
@torch.no_grad()
def test_it_solves_held_out_items_with_the_context_and_not_without(model, tokenizer, task):
    levels = TASKS[task].levels[:1] if task == "documents" else TASKS[task].levels[:3]
    items = [example(task, "test", 7, index, level.name) for level in levels for index in range(24)]
    scores = score(model, tokenizer, items, range(len(items)), 7)
    full = sum(outcome["full"].exact for outcome in scores) / len(items)
    without = sum(outcome["no context"].exact for outcome in scores) / len(items)
    assert full >= FLOORS[task]
    assert without <= 0.45


@torch.no_grad()
def test_greedy_answers_are_right(model, tokenizer):
    chosen = [("reasoning", "5-8"), ("passages", "9-16"), ("passages", "unanswerable"), ("study", "2-3")]
    items = [
        Item(4 * index + number, task, level, example(task, "test", 7, index, level))
        for index in range(10)
        for number, (task, level) in enumerate(chosen)
    ]
    records = grade(model, tokenizer, items, max_new_tokens=400)
    assert len(records) == 40
    assert sum(record["correct"] for record in records) >= 34, [r for r in records if not r["correct"]]
