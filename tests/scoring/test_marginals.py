"""Means over cells, the best cells, and what the plots say."""

from pathlib import Path
from typing import Any

import pytest
from ask_files import write

from kvc.__main__ import main
from kvc.commands.score_plots import figures
from kvc.scoring.cells import Cell, make_cells
from kvc.scoring.files import find_files, read_samples
from kvc.scoring.marginals import STUDIED, having, levels, marginal, ranking, settings_of


def cells_in(folder: Path) -> list[Cell]:
    return make_cells([read_samples(path) for path in find_files([folder])])[0]


@pytest.fixture
def grid(tmp_path: Path) -> list[Cell]:
    """Two budgets by three rotations, one missing; four questions; a baseline."""
    counts = {
        (192, "keep"): [4, 0, 2, 0],
        (192, "place:256"): [2, 0, 0, 0],
        (768, "keep"): [4, 4, 4, 2],
        (768, "place:1024"): [1, 4, 1, 4],
        (768, "place:16384"): [0, 0, 0, 0],
    }
    for number, ((budget, rotation), right) in enumerate(counts.items()):
        write(tmp_path / f"{number}.json", {"memory": right}, budget=budget, rotation=rotation)
    write(tmp_path / "baseline.json", {"none": [1, 1, 0, 0], "full": [4, 4, 4, 4]})
    return cells_in(tmp_path)


def test_marginal_is_the_mean_over_questions_of_the_mean_over_cells(grid: list[Cell]) -> None:
    found = marginal(having(grid, {"budget": 192}), "memory", "mean")
    assert found is not None
    assert (found.value.value, found.value.n, found.cells, found.best) == (0.25, 4, 2, 0.375)
    assert found.value.low is not None
    assert found.value.low < 0.25
    assert marginal(grid, "unrelated", "mean") is None
    assert marginal(having(grid, {"budget": 1}), "memory", "mean") is None


def test_levels_are_in_order(grid: list[Cell]) -> None:
    assert levels(grid, "rotation") == ["keep", "place:256", "place:1024", "place:16384"]
    assert levels(grid, "budget") == [192, 768, 1312]
    assert settings_of(grid[0])[STUDIED] == 3


def test_best_cells_are_measured_on_questions_that_did_not_choose_them(grid: list[Cell]) -> None:
    best, parted = ranking(grid, "memory", "mean", count=2)
    assert parted
    # Questions 0 and 2 choose, 1 and 3 measure.
    assert [(entry.chosen.value, entry.measured.value) for entry in best] == [(1.0, 0.75), (0.75, 0.0)]


def test_one_question_cannot_be_parted(tmp_path: Path) -> None:
    write(tmp_path / "a.json", {"memory": [3]}, budget=192)
    write(tmp_path / "b.json", {"memory": [4]}, budget=768)
    best, parted = ranking(cells_in(tmp_path), "memory", "mean")
    assert not parted
    assert [entry.measured.value for entry in best] == [1.0, 0.75]


def texts(figure: Any) -> list[str]:
    return [text.get_text() for text in figure.axes[0].texts]


def test_figures_say_how_much_is_behind_each_number(grid: list[Cell]) -> None:
    drawn = figures(grid, "mean")
    assert list(drawn) == [
        "mean by budget",
        "mean by rotation",
        "mean by rotation and budget",
        "mean of the best cells",
    ]
    heat = drawn["mean by rotation and budget"]
    # Rows are rotations: keep, place:256, place:1024, place:16384.
    assert [text.split("\n")[0] for text in texts(heat)] == ["0.375", "0.875", "0.125", "", "", "0.625", "", "0.000"]
    assert texts(heat)[1].endswith("\n1 cell")
    assert "n = 4 questions" in heat.axes[0].get_title(loc="left")
    curve = drawn["mean by rotation"]
    assert [label.get_text() for label in curve.axes[0].get_xticklabels()][:2] == ["keep\n2", "place:256\n1"]
    names = [text.get_text() for text in curve.legends[0].get_texts()]
    assert {"none", "full", "budget 192", "budget 768"} <= set(names)
    assert "best cell (biased upwards)" not in names


def test_plots_are_written(grid: list[Cell], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["score", str(tmp_path), "--png", str(tmp_path / "plots"), "--output", str(tmp_path / "out")]) == 0
    assert len(list((tmp_path / "plots").glob("*.png"))) == 4
    assert main(["score", str(tmp_path / "0.json"), "--png", str(tmp_path / "few")]) == 2
    assert "there is one cell" in capsys.readouterr().err
    assert not (tmp_path / "few").exists()
