import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest

from kvc.__main__ import main
from kvc.report.table import cell, key_metrics, lower_is_better, mean_over_seeds


def number(value: float, half: float = 0.02, n: int = 50) -> dict[str, Any]:
    return {"value": value, "low": value - half, "high": value + half, "n": n}


def result(seed: int = 42, accuracy: float = 0.8, **changes: Any) -> dict[str, Any]:
    return {
        "method": "kvc.methods.demo.Demo",
        "seed": seed,
        "samples": 50,
        "metrics": {"accuracy": number(accuracy), "ece": number(0.1)} | {f"extra_{i}": number(0.5) for i in range(6)},
        "arms": {"full_kv": {"accuracy": number(0.9), "ece": number(0.05)}},
        "differences": {"accuracy": {"full_kv": number(accuracy - 0.9)}, "ece": {"full_kv": number(0.05, 0.1)}},
        "base_model": {"name": "tiny", "hash": "b"},
        "data": {"hash": "d"},
        "sizes": {"trainable_parameters": 1_148_032},
        "timing": {"fit_seconds": 15.058},
        "config": {
            "seed_everything": seed,
            "name": f"run{seed}",
            "model": {"init_args": {"width": 4, "seed": seed, "part": {"init_args": {"seed": seed}}}},
        },
        **changes,
    }


def write(folder: Path, value: dict[str, Any]) -> str:
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps(value))
    return str(folder)


def test_one_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", write(tmp_path / "first", result())]) == 0
    out = capsys.readouterr().out
    assert max(len(line) for line in out.splitlines() if "wrote" not in line) <= 80
    for text in ("first", "full_kv", "0.800", "[0.780, 0.820]", "1.15M", "15.1", "-0.100", "[-0.120, -0.080] *"):
        assert text in out
    assert "0.050 [-0.050, 0.150] *" not in out
    assert "extra_2" in out
    assert "extra_5" not in out
    rows = list(csv.DictReader((tmp_path / "first" / "compare.csv").open()))
    assert {row["metric"] for row in rows} >= {"accuracy", "extra_5", "trainable_parameters", "fit_seconds"}
    assert [row["value"] for row in rows if row["kind"] == "difference" and row["metric"] == "ece"] == ["0.05"]
    stored = json.loads((tmp_path / "first" / "compare.json").read_text())
    assert stored["runs"][0]["metrics"] == result()["metrics"]
    assert stored["seeds"] == []


def test_seeds_are_averaged_and_files_lie_in_the_common_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    runs = [write(tmp_path / "a" / f"s{seed}", result(seed, 0.7 + seed / 10)) for seed in (1, 2, 3)]
    other = result(1, 0.3)
    other["config"]["model"]["init_args"]["width"] = 8
    runs.append(write(tmp_path / "a" / "wide", other))
    assert main(["compare", *runs]) == 0
    out = capsys.readouterr().out
    # Accuracies 0.8, 0.9, 1.0: mean 0.9, t(2) 4.303 times 0.1 / sqrt(3).
    assert "s1 and 2 more" in out
    assert "0.900 [0.652, 1.148]" in out
    group = json.loads((tmp_path / "a" / "compare.json").read_text())["seeds"]
    assert [g["runs"] for g in group] == [["s1", "s2", "s3"]]
    assert group[0]["differences"]["accuracy"]["full_kv"]["n"] == 3
    assert group[0]["metrics"]["full_kv"]["accuracy"]["value"] == pytest.approx(0.9)


def test_evaluation_folders_and_chosen_metrics(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [write(tmp_path / "r" / "eval" / name, result(headline=["ece"])) for name in ("test", "other")]
    files = ["--csv", str(tmp_path / "x.csv"), "--json", str(tmp_path / "deep" / "y.json")]
    assert main(["compare", *runs, *files, "--metric", "extra_5"]) == 0
    out = capsys.readouterr().out
    assert "r:test" in out
    assert "extra_5" in out
    assert "accuracy" not in out
    assert (tmp_path / "x.csv").is_file()
    assert (tmp_path / "deep" / "y.json").is_file()
    assert key_metrics([result(headline=["ece"])]) == ["ece"]


def test_a_repeated_seed_counts_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [write(tmp_path / name, result(seed)) for name, seed in (("a", 1), ("b", 2), ("again", 2))]
    assert main(["compare", *runs]) == 0
    assert "warning: b, again have the same settings and seed 2: only b counts" in capsys.readouterr().out
    assert json.loads((tmp_path / "compare.json").read_text())["seeds"][0]["runs"] == ["a", "b"]
    assert main(["compare", *map(str, sorted(tmp_path.iterdir()))]) == 0


def test_warns_of_other_data_and_base(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = write(tmp_path / "a", result())
    second = write(tmp_path / "b", result(7, data={"hash": "e"}, base_model={"hash": "c"}))
    assert main(["compare", first, second]) == 0
    assert len(re.findall("^warning: ", capsys.readouterr().out, re.MULTILINE)) == 2


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (None, "not finished"),
        ('{"metrics": {\n"a": }', "line 2"),
        ("[]", "not a JSON object"),
        ('{"metrics": {"a": {}}}', "metrics.a has no value"),
        ('{"metrics": {"a": {"value": NaN}}}', "metrics.a has no value"),
        ('{"metrics": {"a": {"value": 1}}, "arms": [1]}', "arms is not a JSON object"),
        ('{"samples": 3}', "no metrics"),
    ],
)
def test_bad_results(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str | None, sentence: str) -> None:
    if text is not None:
        (tmp_path / "result.json").write_text(text)
    assert main(["compare", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert sentence in err
    assert str(tmp_path) in err


def test_bad_arguments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write(tmp_path / "a", result())
    assert main(["compare", str(tmp_path / "no")]) == 2
    assert "there is no run folder" in capsys.readouterr().err
    assert main(["compare", run, "--metric", "nothing"]) == 2
    assert "accuracy, ece" in capsys.readouterr().err
    assert main(["compare", run, run]) == 2
    assert "twice" in capsys.readouterr().err
    assert not (tmp_path / "a" / "compare.csv").exists()


def test_direction_and_figures() -> None:
    assert [lower_is_better(m) for m in ("val/loss", "ECE/late", "error_rate", "precision", "exact_match")] == [
        *(True, True, True, False, False)
    ]
    assert cell({"value": 0.873, "low": 0.851, "high": 0.894}) == "0.873 [0.851, 0.894]"
    assert cell({"value": 0.02, "low": 0.001, "high": 0.04}, signed=True) == "+0.020 [0.001, 0.040] *"
    assert cell(None) == "-"
    assert cell({"value": -1e-16, "low": -0.02, "high": 0.02}, signed=True) == "0.000 [-0.020, 0.020]"
    assert mean_over_seeds([1.0, 1.0]) == {"value": 1.0, "n": 2}
