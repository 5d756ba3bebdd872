"""`kvc score` on files with known counts."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from ask_files import content, result, write

from kvc.__main__ import main


def scored(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "extracted_answers_passk.json").read_text())


def test_scores_of_one_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "ask.json", {"memory": [4, 2, 1], "none": [0, 2, 0]})
    assert main(["score", str(tmp_path)]) == 0
    out = scored(tmp_path)
    assert out["k"] == [1, 2, 4]
    (cell,) = out["cells"]
    memory, none = cell["arms"]["memory"], cell["arms"]["none"]
    assert memory["mean"]["value"] == pytest.approx(7 / 12)
    assert memory["mean"]["n"] == 3
    assert memory["mean"]["low"] < 7 / 12 < memory["mean"]["high"]
    # 1 - C(4 - c, 2) / C(4, 2) = 1, 5/6, 1/2.
    assert memory["pass@2"]["value"] == pytest.approx((1 + 5 / 6 + 1 / 2) / 3)
    assert memory["pass@4"]["value"] == 1.0
    # Two against two is drawn, one against three is lost.
    assert memory["majority"]["value"] == pytest.approx(0.5)
    assert none["pass@2"]["value"] == pytest.approx(5 / 18)
    assert cell["differences"]["mean"]["none"]["value"] == pytest.approx(5 / 12)
    shown = capsys.readouterr().out
    assert "0.583" in shown
    assert "none" in shown
    with (tmp_path / "extracted_answers_passk.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6
    assert json.loads(rows[1]["answers"]) == ["16", "16", "7", "7"]
    assert (rows[1]["arm"], rows[1]["id"], rows[1]["correct"], rows[1]["samples"]) == ("memory", "1", "2", "4")
    # The second time the folder holds its own JSON too.
    assert main(["score", str(tmp_path)]) == 0


def test_seeds_are_averaged_by_question_and_settings_make_cells(tmp_path: Path) -> None:
    write(tmp_path / "a" / "ask.json", {"memory": [4, 0]}, seed=42)
    write(tmp_path / "b" / "ask.json", {"memory": [2, 0]}, seed=43)
    write(tmp_path / "c" / "ask.json", {"memory": [1, 1]}, budget=608)
    assert main(["score", str(tmp_path), "--k", "3"]) == 0
    first, second = scored(tmp_path)["cells"]
    assert (first["label"], second["label"]) == ("budget=1312", "budget=608")
    assert len(first["files"]) == 2
    mean, pass3 = first["arms"]["memory"]["mean"], first["arms"]["memory"]["pass@3"]
    assert (mean["value"], mean["n"]) == (pytest.approx(3 / 8), 2)
    # Of each seed by itself: six samples of both would give another number.
    assert pass3["value"] == pytest.approx((1 + 1) / 2 / 2)


def test_differences_are_paired(tmp_path: Path) -> None:
    write(tmp_path / "ask.json", {"memory": [3, 4, 1, 2], "none": [2, 3, 0, 1]})
    assert main(["score", str(tmp_path / "ask.json")]) == 0
    gap = scored(tmp_path)["cells"][0]["differences"]["mean"]["none"]
    assert (gap["low"], gap["value"], gap["high"]) == (0.25, 0.25, 0.25)


def test_answer_for_records_without_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "ask.json"
    path.write_text(json.dumps(content([result(0, "none", [r"\boxed{16}", ""], None)])))
    assert main(["score", str(path)]) == 2
    assert "results[0]: has no answer" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [path]
    assert main(["score", str(path), "--answer", "016"]) == 0
    values = scored(tmp_path)["cells"][0]["arms"]["none"]
    assert (values["mean"]["value"], values["answered"]["value"]) == (0.5, 0.5)
    assert "low" not in values["mean"]


@pytest.mark.parametrize(
    ("change", "words", "complaint"),
    [
        ({"kind": "study"}, (), 'no "kind": "ask"'),
        ({"results": []}, (), "results: expected a list"),
        ({"results": [{"answer": "1"}]}, (), "results[0].all_generations"),
        (
            {"results": [{"answer": "1", "all_generations": [{"generated_text": ""}]}]},
            (),
            "all_generations[0].response",
        ),
        ({"memory": 3}, (), "memory: expected an object"),
        ({}, ("--k", "5"), "--k 5:"),
        ({}, ("--k", "0"), "--k 0:"),
        ({}, ("--metric", "f1"), "--metric f1: there are mean, pass@1"),
    ],
)
def test_bad_input(
    change: dict[str, Any], words: tuple[str, ...], complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "ask.json", {"memory": [1, 0]})
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    assert main(["score", str(path), *words]) == 2
    error = capsys.readouterr().err
    assert complaint in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == [path]


def test_bad_places(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["score", str(tmp_path / "missing")]) == 2
    assert main(["score", str(tmp_path)]) == 2
    (tmp_path / "half.json").write_text('{"kind": "as')
    assert main(["score", str(tmp_path)]) == 2
    one, two, half = capsys.readouterr().err.splitlines()
    assert "no such file or folder" in one
    assert "no answer file" in two
    assert "half.json line 1: not valid JSON" in half


def test_the_same_samples_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "a.json", {"memory": [1]})
    write(tmp_path / "b.json", {"memory": [1]})
    assert main(["score", str(tmp_path)]) == 2
    assert "equal settings and seeds" in capsys.readouterr().err
