"""What an evaluation of an AutoCompressor says: arms, rows of KV, weights of tokens."""

from pathlib import Path
from typing import Any

import pytest
import torch
from autocompressor_steps import TOKENS, batch, method
from torch.nn.functional import cross_entropy

from kvc.core.backbone import Backbone
from kvc.errors import UserError
from kvc.methods.autocompressor.evaluation import Arm, arms_of
from kvc.methods.autocompressor.scoring import summarize
from kvc.methods.autocompressor.summaries import Fixed, Variable


def plain_nll(model: Any, row: dict[str, torch.Tensor], start: int, stop: int) -> torch.Tensor:
    """Loss of tokens `start + 1` to `stop` of a row that is read from `start` on."""
    ids = row["input_ids"][None, start:stop]
    return cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="none")


@torch.no_grad()
def test_arms_are_what_they_are_called(tiny_folder: Path) -> None:
    made = method(tiny_folder, segment_lengths=[12, 9, 10]).eval()
    data = batch()
    base = Backbone(pretrained=str(tiny_folder)).load().eval()
    with torch.no_grad():
        for parameter in made.backbone.parameters():
            parameter.mul_(1.1)
    for row, record in enumerate(made.records(data)):
        arms = record["arms"]
        assert list(arms) == ["method", "no_context", "full", "after_1", "base_no_context", "base_full"]
        stop = int(data["attention_mask"][row].sum())
        own = {key: value[row] for key, value in data.items()}
        for model, prefix in ((made.backbone, ""), (base, "base_")):
            for arm, start in ((f"{prefix}no_context", 30), (f"{prefix}full", 9)):
                nll = plain_nll(model, own, start, max(stop, 30))[30 - start :] if stop > 30 else torch.zeros(0)
                assert arms[arm]["nll"] == pytest.approx(float(nll.sum()), rel=1e-4, abs=1e-6)
                assert arms[arm]["tokens"] == max(stop - 31, 0)
                answers = own["answer"][31:stop]
                assert arms[arm]["answer_nll"] == pytest.approx(float(nll[answers].sum()), rel=1e-4, abs=1e-6)
                assert arms[arm]["answer_tokens"] == int(answers.sum())
        whole = made.compressor.read(
            data["input_ids"][row : row + 1, 9:stop], segment_lengths=[12, 9, stop - 30] if stop > 30 else [12]
        )
        if stop > 30:
            logits = made.compressor.logits(whole.hidden)[0, 21:-1]
            nll = cross_entropy(logits, own["input_ids"][31:stop], reduction="sum")
            assert arms["method"]["nll"] == pytest.approx(float(nll), rel=1e-4)
            one = made.compressor.read(data["input_ids"][row : row + 1, 21:stop], segment_lengths=[9, stop - 30])
            nll = cross_entropy(made.compressor.logits(one.hidden)[0, 9:-1], own["input_ids"][31:stop], reduction="sum")
            assert arms["after_1"]["nll"] == pytest.approx(float(nll), rel=1e-4)
        assert record["loss"] == pytest.approx(arms["method"]["nll"] / max(arms["method"]["tokens"], 1))


@torch.no_grad()
def test_rows_of_kv(tiny_folder: Path) -> None:
    """Two segments of 12 and 9 tokens with 3 vectors each, a last one of 10."""
    data = batch(1)
    for accumulate, share, peak, final in ((True, 6, 9 + 3 + 3, 16), (False, 3, 12 + 3, 13)):
        made = method(tiny_folder, summary=Fixed(3, accumulate), segment_lengths=[12, 9, 10]).eval()
        (record,) = made.records(data)
        arms = record["arms"]
        assert [segment["vectors"] for segment in record["segments"]] == [3, 3]
        assert [segment["facts"] for segment in record["segments"]] == [3, 1]
        assert arms["method"]["kv_share"] == pytest.approx(share / 21)
        assert arms["method"]["kv_tokens_peak"] == max(peak, final)
        assert (arms["method"]["kv_tokens_final"], arms["full"]["kv_tokens_peak"], arms["full"]["kv_share"]) == (
            final,
            31,
            1.0,
        )
        # Keys and values, 2 layers, 2 KV heads of 8, float32.
        assert arms["method"]["kv_bytes_final"] == final * 2 * 2 * 2 * 8 * 4
        assert (arms["no_context"]["kv_tokens_peak"], arms["no_context"]["kv_share"]) == (10, 0.0)


@pytest.mark.parametrize(
    "summary",
    [Fixed(3), Variable(3), Variable(3, gate="log", compress_stop_threshold=0.1), Variable(3, stop_mode="sample")],
)
@torch.no_grad()
def test_records_of_a_batch_are_those_of_its_rows(tiny_folder: Path, summary: Any) -> None:
    made = method(tiny_folder, lora=True, summary=summary, segments_per_substep=3).eval()
    data = batch()
    for row, record in enumerate(made.records(data)):
        (alone,) = made.records({key: value[row : row + 1] for key, value in data.items()})
        assert alone["segments"] == record["segments"]
        for arm, scores in record["arms"].items():
            assert scores == pytest.approx(alone["arms"][arm], rel=1e-3, abs=1e-5), arm


def test_the_full_text_is_read_where_it_fits_the_table_of_positions(tmp_path: Path, tiny_folder: Path) -> None:
    from transformers import AutoTokenizer, OPTConfig, OPTForCausalLM

    config = OPTConfig(
        vocab_size=1536,
        hidden_size=16,
        word_embed_proj_dim=16,
        ffn_dim=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
    )
    OPTForCausalLM(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(tmp_path)
    with torch.no_grad():
        (short,) = method(tmp_path).eval().records(batch(1))
        (extended,) = method(tmp_path, max_position_embeddings=TOKENS).eval().records(batch(1))
    assert list(short["arms"]) == ["method", "no_context", "base_no_context"]
    assert list(extended["arms"]) == ["method", "no_context", "full", "base_no_context", "base_full"]
    assert short["arms"]["method"] == pytest.approx(extended["arms"]["method"])
    with pytest.raises(UserError, match="max_position_embeddings"):
        method(tiny_folder, max_position_embeddings=1000)


def test_controls_have_the_arms_that_make_sense() -> None:
    full = arms_of([5, 5, 5], True, False, False)
    assert list(full) == [
        "method",
        "no_context",
        "base_no_context",
        "base_full",
    ]
    assert list(arms_of([5, 5, 5], False, False, False))[:2] == ["method", "full"]
    assert list(arms_of([5, 5, 5], False, True, True))[:5] == ["method", "no_context", "full", "after_1", "soft"]
    assert full["method"] == Arm(2, full=True)


def scores(nll: float, tokens: int = 10, vectors: int = 2, facts: int = 1) -> dict[str, Any]:
    return {
        "nll": nll,
        "right": 4,
        "tokens": tokens,
        "answer_nll": nll / 2,
        "answer_right": 1,
        "answer_tokens": 3,
        "kv_share": 0.1,
        "kv_tokens_peak": 20,
        "kv_tokens_final": 12,
    }


def test_a_summary_weighs_tokens_and_pairs_blocks() -> None:
    records = [
        {
            "id": row,
            "segments": [{"tokens": 9, "vectors": 1 + row % 3, "facts": 2 * (row % 3)}],
            "arms": {
                "method": scores(20 + row, 10 + row),
                "no_context": scores(30 + 2 * row, 10 + row),
                "full": scores(10, 10 + row),
            },
        }
        for row in range(8)
    ]
    summary = summarize(records, 0)
    tokens = sum(10 + row for row in range(8))
    none, ours, full = (
        sum(map(nll, range(8))) / tokens for nll in (lambda r: 30 + 2 * r, lambda r: 20 + r, lambda r: 10)
    )
    assert summary.metrics["loss"].value == pytest.approx(ours)
    assert summary.metrics["perplexity"].value == pytest.approx(2.718281828**ours, rel=1e-6)
    assert summary.differences["loss"]["no_context"].value == pytest.approx(ours - none)
    assert summary.differences["loss"]["no_context"].high < 0
    assert summary.metrics["recovered"].value == pytest.approx((none - ours) / (none - full))
    assert summary.metrics["answer_recovered"].value == pytest.approx((none - ours) / (none - full))
    assert summary.metrics["facts_vectors_correlation"].value == pytest.approx(1)
    for record in records:
        record["arms"]["full"] = scores(60, 10)
        record["segments"] = []
    without = summarize(records, 0).metrics
    assert not {"recovered", "vectors", "facts_vectors_correlation"} & without.keys()
