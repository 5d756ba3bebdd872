"""The grids of memories: their cells, the ways to make fewer of them, and conditions."""

import functools
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from kvc.__main__ import TRAINER_COMMANDS, main
from kvc.errors import UserError
from kvc.sweep.cells import Cell, make_cells
from kvc.sweep.conditions import parse_condition
from kvc.sweep.grid import Grid, read_grid, without_verification
from kvc.sweep.plan import Plan

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"
COMMANDS = ("study", "ask", "score")


def read(path: Path) -> Grid:
    return read_grid(path, TRAINER_COMMANDS, COMMANDS)


def cells_of(grid: Grid, stage: str) -> list[Cell]:
    return [cell for cell in make_cells(grid, Path("root"), TRAINER_COMMANDS) if cell.stage == stage]


@functools.cache
def experiment(name: str) -> tuple[Grid, dict[str, list[Cell]]]:
    """A grid of the project and its cells by stage."""
    grid = read(EXPERIMENTS / f"{name}.yaml")
    by_stage: dict[str, list[Cell]] = {}
    for cell in make_cells(grid, Path("root"), TRAINER_COMMANDS):
        by_stage.setdefault(cell.stage, []).append(cell)
    return grid, by_stage


def option(cell: Cell, name: str) -> str:
    return cell.argv[cell.argv.index(f"--{name}") + 1]


def grid_file(folder: Path, **content: Any) -> Path:
    path = folder / "grid.yaml"
    path.write_text(yaml.safe_dump({"command": "study", **content}, sort_keys=False))
    return path


@pytest.mark.parametrize(
    ("name", "count"), [("rkv_scenario1", 18), ("rkv_scenario2", 21), ("rkv_budgets", 10), ("rkv_random", 1024)]
)
def test_every_memory_is_asked_and_scored(name: str, count: int) -> None:
    grid, cells = experiment(name)
    studies, asks, scores = (cells[stage] for stage in COMMANDS)
    assert len(studies) == len(asks) == len(scores) == count
    for study, ask, score in zip(studies, asks, scores):
        assert ask.needs == (study.name,)
        assert ask.argv[-1] == option(study, "output") == str(study.folder)
        assert option(ask, "repeat_time") == "16"
        assert option(ask, "output_file") == f"{ask.folder}/ask.json"
        assert score.argv[-1] == str(ask.folder)
        assert int(option(study, "budget")) > sum(
            int(option(study, key)) for key in ("window", "prefix") if f"--{key}" in study.argv
        )
    assert len(cells["table"][0].needs) == count + 1
    baselines = cells["baselines"][0].argv
    assert baselines[-6:] == ("--arms", "none", "full", "notes", "--", option(cells["reference"][0], "output"))
    left = make_cells(without_verification(grid), Path("root"), TRAINER_COMMANDS)
    assert [cell.argv for cell in left] == [cell.argv for cell in studies]


def test_scenarios_have_the_axes_of_the_study() -> None:
    one = experiment("rkv_scenario1")[1]["study"]
    assert {option(cell, "budget") for cell in one} == {"192", "384", "768"}
    assert {int(option(cell, "max_new_tokens")) for cell in one} == {64, 128, 256, 512, 1024, 2048}
    budgets = experiment("rkv_budgets")[1]["study"]
    assert {option(cell, "budget") for cell in budgets} == {"352", "608", "1312", "2336", "8512"}


def test_search_leaves_room_for_every_rotation() -> None:
    cells = experiment("rkv_random")[1]["study"]
    assert len({cell.argv for cell in cells}) == 1024
    for cell in cells:
        how, _, end = option(cell, "rotation").partition(":")
        assert how == "keep" or int(option(cell, "budget")) <= int(end)


def test_a_larger_draw_begins_with_a_smaller_one(tmp_path: Path) -> None:
    axes = {"a": list(range(20)), "b": list(range(20))}
    few, many, other = (
        [cell.name for cell in cells_of(read(grid_file(tmp_path, axes=axes, random={"count": n, "seed": seed})), "")]
        for n, seed in ((5, 42), (50, 42), (50, 43))
    )
    assert many[:5] == few
    assert few == [
        cell.name for cell in cells_of(read(grid_file(tmp_path, axes=axes, random={"count": 5, "seed": 42})), "")
    ]
    assert len(set(many)) == 50
    assert many != other


def test_require_keeps_what_meets_it(tmp_path: Path) -> None:
    axes = {
        "budget": [64, 128],
        "size": [{"name": "wide", "set": {"window": 60}}, {"name": "narrow", "set": {"window": 20}}],
    }
    path = grid_file(tmp_path, set={"prefix": 10}, axes=axes, require=["budget > window + prefix", "prefix <= 10.5"])
    assert [cell.name for cell in cells_of(read(path), "")] == [
        "budget=64,size=narrow",
        "budget=128,size=wide",
        "budget=128,size=narrow",
    ]


@pytest.mark.parametrize(
    ("text", "fine"),
    [
        ("a + b > 3", False),
        ("a + b >= 3", True),
        ("a == 1", True),
        ("a.c < b + 1.5", True),
        ("a != 1", False),
        ("2 <= b", True),
    ],
)
def test_conditions(text: str, fine: bool) -> None:
    assert parse_condition(text).holds({"a": 1, "b": 2, "a.c": 3}) is fine


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ({"require": ["budget"]}, "require: 'budget' is no condition"),
        ({"require": ["budget > __import__('os')"]}, "is no condition"),
        ({"require": ["1 < budget < 3"]}, "is no condition"),
        ({"require": ["budget > window"]}, "window is not set"),
        ({"require": ["budget > rotation"], "set": {"rotation": "keep"}}, "rotation is no number but 'keep'"),
        ({"require": ["budget > 2"]}, "no cell is left"),
        ({"random": {"count": 3, "seed": 1}}, "random.count: 3 cells are to be drawn, but there are only 2"),
        ({"random": {"count": 0, "seed": 1}}, "random.count: expected a number from 1"),
        ({"random": 3}, "random: expected {count: N, seed: N}"),
        ({"verify": 1}, "verify: expected true or false"),
    ],
)
def test_bad_grids(content: dict[str, Any], complaint: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        cells_of(read(grid_file(tmp_path, axes={"budget": [1, 2]}, **content)), "")
    assert complaint in str(error.value)


def test_no_verify(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kvc.planning", SimpleNamespace(plan=lambda argv, planned: Plan()))
    stages: dict[str, Any] = {
        "first": {"command": "score", "args": ["one.json"]},
        "second": {"command": "score", "each": "first", "args": ["{first.run_dir}"], "verify": True},
    }
    path = tmp_path / "grid.yaml"
    path.write_text(yaml.safe_dump({"stages": stages}))
    assert (
        main(["sweep", str(path), "--root", str(tmp_path / "root"), "--slots", "cpu:1", "--dry-run", "--no-verify"])
        == 0
    )
    shown = capsys.readouterr().out
    assert "1 cells" in shown
    assert "second" not in shown
    stages["second"]["verify"] = False
    path.write_text(yaml.safe_dump({"stages": stages}))
    assert main(["sweep", str(path), "--dry-run", "--no-verify"]) == 2
    assert "no stage has it" in capsys.readouterr().err
