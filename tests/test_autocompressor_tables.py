"""The pooled tables of AutoCompressor runs: made-up runs of known numbers."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from experiments.autocompressor_documents import label
from experiments.autocompressor_documents import main as documents
from experiments.autocompressor_lengths import main as lengths

COUNT = 12


def scores(loss: float, right: int = 1, share: float = 0.1) -> dict[str, Any]:
    rows = {"kv_tokens_peak": 40, "kv_tokens_final": 30, "kv_bytes_peak": 400.0, "kv_bytes_final": 300.0}
    answers = {"answer_nll": loss * 3, "answer_right": right, "answer_tokens": 2}
    return {"nll": loss * 10, "right": 5, "tokens": 10, **answers, **rows, "kv_share": share}


def run(folder: Path, seed: int, arms: dict[str, float], vectors: list[int] | None = None, **model: Any) -> str:
    """Twelve documents with the losses of `arms`, a little higher in every second one."""
    (folder / "eval" / "test").mkdir(parents=True)
    settings = {
        "mode": "compress",
        "randomize_substeps": False,
        "stop_draws": 0,
        "training_substeps": 1,
        "summary": None,
        **model,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump({"model": {"init_args": settings}}))
    (folder / "result.json").write_text(json.dumps({"seed": seed, "data": {"hash": "one"}}))
    records = [
        {
            "id": number,
            "arms": {name: scores(loss + 0.1 * (number % 2)) for name, loss in arms.items()},
            "segments": [{"facts": number % 4, "vectors": vectors[number % 4], "tokens": 10}] if vectors else [],
        }
        for number in range(COUNT)
    ]
    (folder / "eval" / "test" / "predictions.jsonl").write_text("\n".join(map(json.dumps, records)))
    return str(folder)


def summary(kind: str, **settings: Any) -> dict[str, Any]:
    return {"class_path": f"kvc.methods.autocompressor.summaries.{kind}", "init_args": settings}


def fixed(length: int, accumulate: bool = True) -> dict[str, Any]:
    return summary("Fixed", summary_length=length, accumulate_summary=accumulate)


def controls(folder: Path, seed: int) -> list[str]:
    base = {"base_no_context": 3.0, "base_full": 1.2}
    return [
        run(folder / f"none-{seed}", seed, {"method": 2.0, "full": 1.4, **base}, summary=fixed(0)),
        run(folder / f"full-{seed}", seed, {"method": 1.0, "no_context": 2.5, **base}, mode="full_attention"),
    ]


def test_documents_are_pooled_over_seeds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = []
    for seed, loss in ((1, 1.4), (2, 1.2)):
        arms = {
            "method": loss,
            "no_context": 2.1,
            "full": 1.1,
            "after_1": 1.8,
            "base_no_context": 3.0,
            "base_full": 1.2,
        }
        folders += [*controls(tmp_path, seed), run(tmp_path / f"ours-{seed}", seed, arms, [4] * 4, summary=fixed(4))]
    out, png = tmp_path / "out.json", tmp_path / "out.png"
    assert documents([*folders, "--out", str(out), "--png", str(png)]) == 0
    result = json.loads(out.read_text())
    assert result["n"] == COUNT
    ours = result["arms"]["4 vectors"]
    assert ours["loss"]["value"] == pytest.approx(1.35)
    assert ours["by_seed"] == pytest.approx([1.45, 1.25])
    assert ours["recovered"]["value"] == pytest.approx((2.0 - 1.3) / (2.0 - 1.0))
    assert ours["gain"]["value"] == pytest.approx(0.7)
    assert ours["gain"]["low"] == pytest.approx(0.7)
    assert list(result["arms"])[:2] == ["no context, tuned", "full text, tuned"]
    assert {"4 vectors, after 0", "4 vectors, after 1", "full text, base model"} <= set(result["arms"])
    assert "full text, tuned, after 0" not in result["arms"]
    assert "| 4 vectors | 1.350 [" in capsys.readouterr().out
    assert png.read_bytes().startswith(b"\x89PNG")


def test_lengths_by_facts_and_hard_stops_beside_soft(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = []
    for seed, made in ((1, [0, 1, 3, 4]), (2, [0, 1, 1, 6])):
        arms = {"method": 1.4, "no_context": 2.1, "full": 1.1, "soft": 1.3}
        variable = {"compression_max_len": 8, "gate": "log", "compression_lambda": 2.0}
        folders += [
            *controls(tmp_path, seed),
            run(tmp_path / f"ours-{seed}", seed, arms, made, summary=summary("Variable", **variable)),
        ]
    out, png = tmp_path / "out.json", tmp_path / "out.png"
    assert lengths([*folders, "--out", str(out), "--png", str(png)]) == 0
    ((name, found),) = json.loads(out.read_text())["settings"].items()
    assert name == "up to 8 vectors, gate log, lambda 2"
    assert found["vectors"]["value"] == pytest.approx(2.0)
    assert found["by_facts"] == {"0": 0.0, "1": 1.0, "2": 2.0, "3": 5.0}
    assert found["correlation"]["value"] == pytest.approx(1.0)
    assert found["hard_minus_soft"]["value"] == pytest.approx(0.1)
    assert found["recovered"]["value"] == pytest.approx(0.6)
    assert "| log | 2 | 2.00 [" in capsys.readouterr().out
    assert png.read_bytes().startswith(b"\x89PNG")


def test_what_cannot_be_compared_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pair, out = controls(tmp_path, 1), str(tmp_path / "out.json")
    again = run(tmp_path / "again", 1, {"method": 2.0}, summary=fixed(0))
    for words, given, table in (
        ("no run of 'full text, tuned'", pair[:1], documents),
        ("a second run of 'no context, tuned' with the seed 1", [*pair, again], documents),
        ("no run of variable length", pair, lengths),
        ("not finished", [*pair, str(tmp_path)], lengths),
    ):
        assert table([*given, "--out", out]) == 2
        assert words in capsys.readouterr().err
    assert not Path(out).exists()


def test_labels_say_what_differs(tmp_path: Path) -> None:
    for number, (settings, name) in enumerate(
        [
            ({"summary": fixed(16)}, "16 vectors"),
            ({"summary": fixed(16, False), "training_substeps": 2}, "16 vectors, replaced, 2 substeps"),
            ({"summary": fixed(8), "randomize_substeps": True}, "8 vectors, random segments"),
        ]
    ):
        folder = Path(run(tmp_path / str(number), 1, {"method": 1.0}, **settings))
        assert label(folder) == name
