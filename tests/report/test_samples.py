import json
from pathlib import Path
from typing import Any

import pytest

from kvc.report.folder import Finished
from kvc.report.samples import Piece, pieces_of, read_samples


def run(folder: Path, records: list[Any]) -> Finished:
    folder.mkdir()
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    (folder / "predictions.jsonl").write_text("\n".join(lines))
    return Finished(folder.name, folder, {"split": "test"})


def record(number: Any, completion: str = "7", **more: Any) -> dict[str, Any]:
    return {"id": number, "gold": "7", "completion": completion, "correct": completion == "7", **more}


def test_common_ids_side_by_side(tmp_path: Path) -> None:
    one = run(tmp_path / "one", [record(i, prompt=f"p{i}", task="sum") for i in (1, 2, 3, 4)])
    two = run(tmp_path / "two", [record(i, "8") for i in (0, 4, 3, 2)])
    found = read_samples([one, two], 2)
    assert [sample.id for sample in found.samples] == ["2", "3"]
    first = found.samples[0]
    assert (first.prompt, first.gold, first.about) == ("p2", "7", "task sum")
    assert [(a.run, a.completion, a.correct) for a in first.answers] == [("one", "7", True), ("two", "8", False)]
    assert found.missing == []


def test_a_broken_file_leaves_the_others(tmp_path: Path) -> None:
    fine = run(tmp_path / "fine", [record("a", correct=None)])
    broken = run(tmp_path / "broken", [record("a"), '{"id": 3, "compl'])
    nameless = run(tmp_path / "nameless", ["[1]"])
    silent = run(tmp_path / "silent", [{"id": "a", "loss": 1.0}])
    absent = Finished("absent", tmp_path, {})
    found = read_samples([fine, broken, nameless, silent, absent], 5)
    assert [[answer.run for answer in sample.answers] for sample in found.samples] == [["fine"]]
    assert found.samples[0].answers[0].correct is None
    assert found.missing == [
        "broken: line 2 of its predictions.jsonl is broken: not a JSON object with an id",
        "nameless: line 1 of its predictions.jsonl is broken: not a JSON object with an id",
        "absent: there is no predictions.jsonl",
        "silent: its predictions hold no text",
    ]


def test_nothing_in_common(tmp_path: Path) -> None:
    found = read_samples([run(tmp_path / "one", [record(1)]), run(tmp_path / "two", [record(2)])], 5)
    assert found.samples == []
    assert found.missing == ["the first 1000 predictions of the runs have no id in common"]


def test_fit_leaves_predictions_below_the_run(tmp_path: Path) -> None:
    (tmp_path / "r" / "eval").mkdir(parents=True)
    run(tmp_path / "r" / "eval" / "val", [record(1)])
    assert len(read_samples([Finished("r", tmp_path / "r", {"split": "val"})], 5).samples) == 1


def test_scored_tokens_become_pieces() -> None:
    scored = {"text": "ab cd ef!", "ends": [2, 5, 8], "scores": [0.01, 0.05, 0.98], "labels": [0, 0, 1]}
    assert pieces_of(scored) == (Piece("ab cd", 0, False), Piece(" ef", 5, True), Piece("!", 0, False))
    assert pieces_of({**scored, "labels": [1, 0, 1]})[0] == Piece("ab", 0, True)


@pytest.mark.parametrize("change", [{"ends": [2]}, {"scores": [0, "x", 1]}, {"text": None}, {"labels": None}])
def test_scores_that_do_not_fit_the_text_are_left_out(change: dict[str, Any]) -> None:
    scored = {"text": "ab cd ef", "ends": [2, 5, 8], "scores": [0.1, 0.2, 0.9], "labels": [0, 0, 1]}
    assert pieces_of({**scored, **change}) == ()
