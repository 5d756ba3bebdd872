"""The eviction report: arms on the same questions, records, costs, and the command that writes them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from kvc.__main__ import main
from kvc.core.backbone import Backbone
from kvc.data.language import Item
from kvc.data.synthetic.tasks import example
from kvc.errors import UserError
from kvc.eviction.none import FullKV
from kvc.eviction.rkv import RKV
from kvc.eviction.streaming_llm import StreamingLLM
from kvc.eviction.triggers import BudgetBuffer
from kvc.methods.rkv import EvictionReport
from kvc.methods.rkv.answering import encode
from kvc.methods.rkv.picture import accuracy_by_budget
from kvc.methods.rkv.summary import FULL, NO_CONTEXT, summarize

QUESTIONS = [Item(n, "reasoning", "2-4", example("reasoning", "test", 42, n, "2-4")) for n in range(6)]


@pytest.fixture(scope="module")
def records() -> list[dict[str, Any]]:
    report = EvictionReport(
        policies={"rkv": RKV(), "streaming": StreamingLLM(), "none": FullKV()},
        budgets=[24, 400],
        trigger=BudgetBuffer(8),
        max_new_tokens=120,
    )
    return report.records({"questions": QUESTIONS})


def test_every_arm_answers_every_question(records: list[dict[str, Any]]) -> None:
    arms = {FULL, NO_CONTEXT, "rkv@24", "rkv@400", "streaming@24", "streaming@400", "none@24", "none@400"}
    assert [record["id"] for record in records] == [question.id for question in QUESTIONS]
    for record, question in zip(records, QUESTIONS):
        assert set(record["arms"]) == arms
        assert record["gold"] == question.gold
        full = record["arms"][FULL]
        assert full["completion"].startswith(question.example.chunks[0][0].text[:4])
        assert full["kv_tokens_peak"] == full["prompt_tokens"] + full["new_tokens"] - 1
        # A budget above the whole text, and the policy that keeps everything, are the plain model.
        for arm in ("rkv@400", "streaming@400", "none@24", "none@400"):
            assert record["arms"][arm]["completion"] == full["completion"]
            assert record["arms"][arm]["compressions"] == 0
        assert record["arms"][NO_CONTEXT]["prompt_tokens"] < full["prompt_tokens"]
        for arm in ("rkv@24", "streaming@24"):
            answer = record["arms"][arm]
            assert answer["compressions"] >= 1 + (answer["new_tokens"] - 1) // 8 - 1
            # The prompt is read in full, so that is the peak.
            assert answer["kv_tokens_peak"] == max(answer["prompt_tokens"], min(answer["new_tokens"] + 23, 32))
            assert answer["kv_bytes_final"] < full["kv_bytes_final"]


def test_the_model_is_right_with_the_full_memory_only(records: list[dict[str, Any]]) -> None:
    summary = summarize(records, 42)
    assert summary.metrics["accuracy"].value == 1.0
    assert summary.arms[NO_CONTEXT]["accuracy"].value == 0.0
    assert summary.arms["rkv@24"]["accuracy"].value < 0.5
    assert summary.differences["accuracy"]["rkv@400"].value == 0.0
    lost = summary.differences["accuracy"]["rkv@24"]
    assert lost.value == 1 - summary.arms["rkv@24"]["accuracy"].value
    assert summary.arms["rkv@24"]["fired"].value == 1.0
    assert summary.arms["rkv@400"]["fired"].value == 0.0
    assert summary.arms["rkv@24"]["kv_bytes_mean"].value < summary.metrics["kv_bytes_mean"].value


def answer_of(correct: bool, **values: Any) -> dict[str, Any]:
    costs = ("kv_tokens_peak", "kv_tokens_mean", "kv_bytes_peak", "kv_bytes_mean", "compressions", "new_tokens")
    return dict.fromkeys(costs, 0) | {"correct": correct, "finish": "eos"} | values


def test_answers_to_one_question_are_one_unit() -> None:
    """Two questions with two answers each: accuracies .5 and 1, so n is 2 and not 4."""
    marks = [True, False, True, True]
    found = [
        {"question": number // 2, "arms": {FULL: answer_of(True), "rkv@8": answer_of(mark, compressions=number)}}
        for number, mark in enumerate(marks)
    ]
    summary = summarize(found, 0)
    accuracy = summary.arms["rkv@8"]["accuracy"]
    assert (accuracy.value, accuracy.n) == (0.75, 2)
    assert (accuracy.low, accuracy.high) == (0.5, 1.0)
    assert summary.arms["rkv@8"]["compressions"].value == 1.5
    assert summary.differences["accuracy"]["rkv@8"].value == 0.25


def test_samples_are_drawn_independently_and_repeatably() -> None:
    report = EvictionReport(budgets=[24], max_new_tokens=30, samples=3, temperature=1.5, top_p=1.0)
    first, again = (report.records({"questions": QUESTIONS[:2]}) for _ in range(2))
    texts = [[record["arms"][FULL]["completion"] for record in records] for records in (first, again)]
    assert texts[0] == texts[1]
    assert len(set(texts[0])) == 6
    assert [record["question"] for record in first] == [0, 0, 0, 1, 1, 1]
    assert [record["id"] for record in first] == list(range(6))


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 100])
def test_rows_decoded_together_are_bounded(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    widths = []

    def spy(model: Any, tokenizer: Any, questions: Any, prompts: Any, *args: Any) -> list[dict[str, Any]]:
        samples = args[2]
        widths.append(len(questions) * samples)
        seed = args[3].seed
        return [answer_of(True, who=(question.id, seed, n)) for question in questions for n in range(samples)]

    monkeypatch.setattr("kvc.methods.rkv.module.answer", spy)
    report = EvictionReport(budgets=[24], samples=3, temperature=1.0, rows=rows)
    found = report.records({"questions": QUESTIONS[:3]})
    assert max(widths) <= max(rows, 1)
    assert [record["question"] for record in found] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    told = [record["arms"][FULL]["who"] for record in found]
    assert [who for who, _, _ in told] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert len(set(told)) == 9


def test_the_picture_has_a_line_for_each_policy(records: list[dict[str, Any]]) -> None:
    figure = accuracy_by_budget(summarize(records, 42))
    legend = figure.axes[0].get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["rkv", "streaming", "none"]


def test_encode_pads_on_the_left_behind_one_bos() -> None:
    tokenizer = Backbone().load_tokenizer()
    bos = tokenizer.bos_token
    ids, mask = encode(tokenizer, ["Ida has 5 keys", f"{bos}Ida"], torch.device("cpu"))
    assert mask.sum(1).tolist() == [5, 2]
    assert (ids == tokenizer.bos_token_id).sum(1).tolist() == [1, 1]
    assert int(ids[1, -2]) == tokenizer.bos_token_id


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"budgets": []}, "budgets: there is none to measure"),
        ({"samples": 4}, "samples: greedy answers to one question are all the same"),
        ({"budgets": [8]}, r"budget: RKV needs more than 8 tokens \(window 8 \+ prefix 0\), got 8"),
        ({"budgets": [64], "prefix": 60}, r"budget: RKV needs more than 68 tokens"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        EvictionReport(**settings)


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    argv = ["test", "--config", "configs/rkv/tiny.yaml", "--run_dir", str(run), "--data.held_out", "3"]
    argv += ["--data.levels", "[2-4]", "--model.budgets", "[40]", "--model.max_new_tokens", "60"]
    assert main(argv) == 0
    result = json.loads((run / "result.json").read_text())
    assert result["metrics"]["accuracy"]["n"] == 3
    assert len(result["arms"]) == 10
    assert (run / "accuracy.png").is_file()
    lines = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    assert len(lines) == 3
    assert {"completion", "answer", "correct", "kv_bytes_peak", "compressions"} <= set(lines[0]["arms"]["h2o@40"])
    capsys.readouterr()
    argv[argv.index(str(run))] = str(tmp_path / "other")
    wrong = {
        "policies.rkv=kvc.eviction.rkv.RVK": "kvc.eviction.rkv.RVK",
        "budgets=[8]": "budget: RKV needs more than 8 tokens (window 8 + prefix 0), got 8",
        "backbone.attn_implementation=flex_attention": "nobody can see the queries of 'flex_attention' attention",
    }
    for setting, sentence in wrong.items():
        assert main([*argv, f"--model.{setting}"]) == 2
        error = capsys.readouterr().err
        assert sentence in error
        assert error.startswith("kvc: error: ")
        assert error.count("\n") == 1
        assert not (tmp_path / "other" / "result.json").exists()
