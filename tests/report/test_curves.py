from pathlib import Path

import pytest
from finished_runs import write_events

from kvc.report.curves import read_curves, read_scalars
from kvc.report.folder import Finished


def finished(folder: Path, label: str = "") -> Finished:
    return Finished(label or folder.name, folder, {})


def test_a_resumed_run_repeats_steps(tmp_path: Path) -> None:
    write_events(tmp_path, {"val/f1": [(1, 0.25), (2, 0.5), (3, 9.0)], "other": [(1, 1.0)]})
    write_events(tmp_path, {"val/f1": [(3, 0.75), (4, 1.0)]})
    assert read_scalars(tmp_path)["val/f1"] == [(1, 0.25), (2, 0.5), (3, 0.75), (4, 1.0)]


def test_validation_is_shown_and_training_only_without_it(tmp_path: Path) -> None:
    both, train, nothing = tmp_path / "both", tmp_path / "train", tmp_path / "nothing"
    write_events(both, {"val/f1": [(1, 0.5)], "train/loss": [(1, 2.0)]})
    write_events(train, {"train/loss": [(1, 3.0), (2, float("nan"))]})
    nothing.mkdir()
    curves = read_curves([finished(both), finished(train), finished(nothing)])
    assert curves.tags == {"val/f1": {"both": [(1, 0.5)]}}
    assert curves.missing == ["nothing: no TensorBoard events", "train: its events hold no metric of a training"]
    assert read_curves([finished(train)]).tags == {"train/loss": {"train": [(1, 3.0)]}}


def test_an_evaluation_has_the_curves_of_its_run(tmp_path: Path) -> None:
    write_events(tmp_path / "run", {"val/f1": [(1, 0.5)]})
    (tmp_path / "run" / "eval" / "other").mkdir(parents=True)
    assert read_curves([finished(tmp_path / "run" / "eval" / "other", "run:other")]).tags == {
        "val/f1": {"run:other": [(1, 0.5)]}
    }


@pytest.mark.parametrize("damage", ["cut", "garbage"])
def test_broken_events(tmp_path: Path, damage: str) -> None:
    write_events(tmp_path, {"val/f1": [(1, 0.5), (2, 0.75)]})
    (events,) = tmp_path.glob("*.tfevents.*")
    data = events.read_bytes()
    if damage == "cut":  # a killed run: what is whole counts
        events.write_bytes(data[:-7])
        assert read_curves([finished(tmp_path, "r")]).tags["val/f1"]["r"] == [(1, 0.5)]
    else:
        events.write_bytes(b"nothing that TensorBoard knows " * 9)
        curves = read_curves([finished(tmp_path, "r")])
        assert curves.tags == {}
        assert len(curves.missing) == 1
        assert curves.missing[0].startswith("r: its")
