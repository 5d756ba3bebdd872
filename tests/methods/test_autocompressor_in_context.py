"""Answers chosen by likelihood, after compressed demonstrations and after the full text."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from kvc.core.backbone import Backbone
from kvc.data.demonstrations import Demonstrations
from kvc.methods.autocompressor import AutoCompressor
from kvc.methods.autocompressor.in_context import choice_arms, summarize_choices
from kvc.methods.autocompressor.summaries import Fixed, Variable

BLOCK = 80


class Running:
    world_size, global_rank, current_epoch = 1, 0, 0

    def __init__(self, module: Any) -> None:
        self.lightning_module = module


def queries(made: AutoCompressor) -> dict[str, torch.Tensor]:
    data = Demonstrations(block_size=BLOCK, demonstrations=8, count=4, eval_batch_size=4)
    data.trainer = Running(made)
    data.setup("test")
    batch: dict[str, torch.Tensor] = next(iter(data.test_dataloader()))
    return batch


def method(tiny_folder: Path, summary: Any) -> AutoCompressor:
    made = AutoCompressor(Backbone(pretrained=str(tiny_folder)), summary, segments_per_substep=2).eval()
    generator = torch.Generator().manual_seed(3)
    for parameter in made.summary.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    return made


@torch.no_grad()
def test_the_choice_is_that_of_one_option_at_a_time(tiny_folder: Path) -> None:
    made = method(tiny_folder, Fixed(3))
    batch = queries(made)
    records = made.records(batch)
    for row, record in enumerate(records):
        told = batch["input_ids"][row][batch["attention_mask"][row].bool()]
        prompt = made.compressor.read(
            batch["input_ids"][row : row + 1],
            batch["attention_mask"][row : row + 1],
            segment_lengths=[40, 40],
            output_softprompt=True,
        ).prompt
        losses: dict[str, list[float]] = {"full": [], "method": [], "no_context": []}
        for column in range(4):
            shown = batch["option_mask"][row, column].bool()
            asked = batch["option_ids"][row, column][shown]
            answers = int(batch["option_answer"][row, column].sum())
            whole = torch.cat([told, asked])[None]
            logits = {
                "full": made.backbone(whole).logits[0],
                "no_context": made.backbone(asked[None]).logits[0],
                "method": made.compressor.logits(made.compressor.read(asked[None], softprompt=prompt).hidden)[0],
            }
            for name, found in logits.items():
                losses[name].append(float(cross_entropy(found[-answers - 1 : -1], asked[-answers:])))
        for name, found in losses.items():
            best = min(range(4), key=found.__getitem__)
            assert record["arms"][name]["chosen"] == best
            assert record["arms"][name]["correct"] == (best == int(batch["gold"][row]))
        assert record["arms"]["method"]["kv_tokens_context"] == 6
        assert record["arms"]["full"]["kv_tokens_context"] == len(told)
        assert record["correct"] == record["arms"]["method"]["correct"]
    assert set(made.summarize(records).metrics) == {"accuracy", "kv_share", "kv_tokens_context", "kv_bytes_context"}


@torch.no_grad()
def test_rows_with_different_numbers_of_vectors_do_not_disturb_each_other(tiny_folder: Path) -> None:
    made = method(tiny_folder, Variable(4, compress_stop_threshold=0.12))
    batch = queries(made)
    together = made.records(batch)
    for row, record in enumerate(together):
        (alone,) = made.records({key: value[row : row + 1] for key, value in batch.items()})
        assert alone == record


@torch.no_grad()
def test_demonstrations_may_be_shorter_than_the_blocks_of_training(tiny_folder: Path) -> None:
    made = AutoCompressor(Backbone(pretrained=str(tiny_folder)), Fixed(3), segment_lengths=[200, 100]).eval()
    same = AutoCompressor(Backbone(pretrained=str(tiny_folder)), Fixed(3), segments_per_substep=2).eval()
    batch = queries(made)
    assert made.records(batch) == same.records(batch)


def test_a_summary_pairs_the_queries() -> None:
    def scores(right: bool) -> dict[str, Any]:
        return {"correct": right, "kv_share": 0.5, "kv_tokens_context": 6}

    records = [
        {"arms": {"method": scores(number < 6), "no_context": scores(number < 2)}, "correct": number < 6}
        for number in range(8)
    ]
    summary = summarize_choices(records, 0)
    assert summary.metrics["accuracy"].value == 0.75
    assert summary.arms["no_context"]["accuracy"].value == 0.25
    assert summary.differences["accuracy"]["no_context"].value == pytest.approx(0.5)
    assert summary.differences["accuracy"]["no_context"].low > 0


def test_controls_have_no_arm_twice() -> None:
    assert list(choice_arms(True, False))[:2] == ["method", "no_context"]
    assert list(choice_arms(False, False))[:2] == ["method", "full"]
