"""Grid files: which cells they make, and what is said about bad ones."""

from pathlib import Path

import pytest
import yaml

from kvc.__main__ import main
from kvc.sweep.cells import Cell, make_cells
from kvc.sweep.grid import read_grid

TRAINER = ("fit", "test")


def cells_of(folder: Path, **content: object) -> list[Cell]:
    path = folder / "grid.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return make_cells(read_grid(path, TRAINER, ("compare", "annotate")), Path("runs/grid"), TRAINER)


def words(cell: Cell) -> str:
    return " ".join(cell.argv)


def test_cells_are_the_product_with_readable_names(tmp_path):
    (tmp_path / "base.yaml").write_text("{}")
    (tmp_path / "big.yaml").write_text("{}")
    cells = cells_of(
        tmp_path,
        base="base.yaml",
        set={"trainer.max_epochs": 2, "model.cache": True, "data.limit": None},
        axes={
            "model.init_args.optim.lr": [0.001, "1e-2"],
            "data.init_args.counts": [[4, 2, 2]],
            "config": ["big.yaml"],
            "size": [{"name": "two keys", "set": {"a.b": 1, "trainer.max_epochs": 3}}],
        },
        seeds=[42],
    )
    assert [cell.name for cell in cells] == [
        "lr=0.001,counts=4-2-2,config=big,size=two-keys,seed=42",
        "lr=1e-2,counts=4-2-2,config=big,size=two-keys,seed=42",
    ]
    assert words(cells[0]) == (
        f"fit --config {tmp_path}/base.yaml --config {tmp_path}/big.yaml --trainer.max_epochs 3 --model.cache true "
        "--data.limit null --model.init_args.optim.lr 0.001 --data.init_args.counts [4, 2, 2] --a.b 1 "
        f"--seed_everything 42 --run_dir runs/grid/{cells[0].name}"
    )


def test_names_use_as_much_of_a_key_as_tells_it_from_the_others(tmp_path):
    cells = cells_of(tmp_path, axes={"model.optim.lr": [1], "data.optim.lr": [2], "trainer.max_epochs": [3]})
    assert [cell.name for cell in cells] == ["model.optim.lr=1,data.optim.lr=2,max_epochs=3"]


def test_include_and_exclude(tmp_path):
    cells = cells_of(
        tmp_path,
        axes={"lr": [1, 2], "size": [{"name": "s", "set": {"d": 8}}, {"name": "m", "set": {"d": 16}}]},
        seeds=[1, 2],
        exclude=[{"lr": 1, "size": "s"}, {"lr": 2, "seed": [1, 2], "size": "m"}],
        include=[{"lr": 9, "size": "m"}, {"name": "hot", "set": {"temperature": 3}, "seed": 5}],
    )
    assert [cell.name for cell in cells] == [
        "lr=1,size=m,seed=1",
        "lr=1,size=m,seed=2",
        "lr=2,size=s,seed=1",
        "lr=2,size=s,seed=2",
        "lr=9,size=m",
        "hot",
    ]
    assert words(cells[4]) == "fit --lr 9 --d 16 --run_dir runs/grid/lr=9,size=m"
    assert words(cells[5]) == "fit --temperature 3 --seed_everything 5 --run_dir runs/grid/hot"


def test_needs_meet_cells_of_the_same_values_or_the_single_shared_one(tmp_path):
    cells = cells_of(
        tmp_path,
        stages={
            "base": {},
            "traces": {
                "command": "annotate",
                "axes": {"lr": [{"name": "1"}, {"name": "2"}]},
                "set": {"output": "{run_dir}/t.jsonl", "overwrite": True, "input": None},
            },
            "train": {"axes": {"lr": [1, 2], "size": [8, 9]}, "set": {"data.path": "{traces.run_dir}/t.jsonl"}},
            "check": {"command": "test", "each": "train", "needs": "base", "set": {"run": "{train.run_dir}"}},
            "deep": {
                "command": "test",
                "axes": {"budget": [3, 4]},
                "set": {"run": "{base.run_dir}"},
            },
            "table": {"command": "compare", "args": ["{base.run_dir}", "{train.run_dirs}", "--metric", "f1"]},
        },
    )
    by_name = {cell.name: cell for cell in cells}
    assert words(by_name["traces/lr=2"]) == "annotate --output runs/grid/traces/lr=2/t.jsonl --overwrite"
    assert by_name["train/lr=2,size=8"].needs == ("traces/lr=2",)
    assert "--data.path runs/grid/traces/lr=2/t.jsonl" in words(by_name["train/lr=2,size=8"])
    check = by_name["check/lr=2,size=9"]
    assert check.needs == ("base", "train/lr=2,size=9")
    assert words(check) == "test --run runs/grid/train/lr=2,size=9 --eval_name check"
    assert check.folder == Path("runs/grid/train/lr=2,size=9/eval/check")
    assert by_name["deep/budget=4"].folder == Path("runs/grid/base/eval/deep,budget=4")
    assert words(by_name["table"]) == (
        "compare runs/grid/base runs/grid/train/lr=1,size=8 runs/grid/train/lr=1,size=9 runs/grid/train/lr=2,size=8 "
        "runs/grid/train/lr=2,size=9 --metric f1"
    )
    assert len({cell.folder for cell in cells}) == len(cells)


AXES = {"axes": {"lr": [1, 2]}}
BAD = {
    "unknown key": ({"axs": {}}, "axs: unknown key; a grid has name, command"),
    "unknown key of a stage": ({"stages": {"a": {"axs": {}}}}, "stages.a.axs: unknown key"),
    "key beside stages": ({"stages": {"a": {}}, "base": "x"}, "base: unknown key; a grid has name, stages"),
    "unknown key of a value": ({"axes": {"x": [{"name": "a", "sett": {}}]}}, "axes.x.sett: unknown key"),
    "value without a name": (
        {"axes": {"x": [{"set": {"a": 1}}]}},
        "axes.x: a value that sets several keys needs a name",
    ),
    "empty axis": ({"axes": {"lr": []}}, "axes.lr: expected a list of at least one value"),
    "axis is no list": ({"axes": {"lr": 3}}, "axes.lr: expected a list"),
    "no seeds": ({"seeds": []}, "seeds: expected a list of numbers"),
    "seeds are text": ({"seeds": ["a"]}, "seeds: expected a list of numbers"),
    "seed axis": ({"axes": {"seed": [1]}}, "axes.seed: use seeds"),
    "unknown command": ({"command": "fitt"}, "command: there is no command 'fitt' to sweep"),
    "sweep of sweeps": ({"command": "sweep"}, "command: there is no command 'sweep' to sweep"),
    "missing base": ({"base": "none.yaml"}, "base: there is no file"),
    "missing file in a value": ({"axes": {"model": ["none.yaml"]}}, "axes.model: there is no file"),
    "run_dir by hand": ({"set": {"run_dir": "x"}}, "set.run_dir: is set by the sweep"),
    "gpus": ({"gpus_per_cell": 0}, "gpus_per_cell: expected a number from 1, got 0"),
    "args of fit": ({"args": ["x"]}, "args: fit takes no positional arguments"),
    "unknown needs": ({"stages": {"a": {"needs": "b"}}}, "stages.a.needs: there is no stage 'b'"),
    "unknown each": ({"stages": {"a": {"each": "b"}}}, "there is no stage 'b'"),
    "unknown reference": (
        {"stages": {"a": {"set": {"x": "{b.run_dir}"}}}},
        "stage 'a': {b.run_dir} names no stage",
    ),
    "circle": (
        {"stages": {"a": {"needs": "b"}, "b": {"set": {"x": "{c.run_dir}"}}, "c": {"needs": "a"}}},
        "needs: the stages need each other in a circle: a -> b -> c -> a",
    ),
    "itself": ({"stages": {"a": {"needs": "a"}}}, "in a circle: a -> a"),
    "two values of one name": ({"axes": {"x": ["a b", "a-b"]}}, "axes.x: two values are called 'a-b'"),
    "two cells of one name": (
        {**AXES, "include": [{"name": "lr=1", "set": {"x": 3}}]},
        "two cells are called 'lr=1'",
    ),
    "exclude an unknown axis": ({**AXES, "exclude": [{"l": 1}]}, "exclude.l: no axis; there are lr"),
    "exclude an unknown value": ({**AXES, "exclude": [{"lr": 3}]}, "exclude.lr: the axis has no value 3"),
    "exclude nothing": (
        {**AXES, "exclude": [{"lr": 1}, {"lr": 1}, {"lr": [1, 2]}]},
        "no cell is left",
    ),
    "no cell with these values": (
        {"stages": {"a": AXES, "b": {"axes": {"lr": [3]}, "needs": "a"}}},
        "cell b/lr=3 needs a cell of stage 'a' with its values: there is none",
    ),
    "one of several": (
        {"stages": {"a": AXES, "b": {"set": {"x": "{a.run_dir}"}}}},
        "cell b: {a.run_dir} is one of 2 runs: write {a.run_dirs} for all, or each: a",
    ),
    "several for one": (
        {"stages": {"a": AXES, "b": {"set": {"x": "{a.run_dirs}"}}}},
        "cell b: {a.run_dirs} stands for 2 folders where one word is expected",
    ),
    "inherited axis": (
        {"stages": {"a": AXES, "b": {"each": "a", **AXES}}},
        "stage 'b' has lr from stage 'a' already",
    ),
    "stage is a list": ({"stages": {"a": [1]}}, "stages.a: expected a mapping"),
    "name of a stage": ({"stages": {"a/b": {}}}, "stages.a/b: a stage's name is that of a folder"),
    "name of the grid": ({"name": "../x"}, "name: expected the name of a folder"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_grid_is_one_sentence_and_nothing_starts(case, tmp_path, monkeypatch, capsys):
    content, message = BAD[case]
    monkeypatch.chdir(tmp_path)
    Path("bad.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    assert main(["sweep", "bad.yaml", "--slots", "cpu:2"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("kvc: error: bad.yaml: ")
    assert message in error
    assert error.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.yaml"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stages: {a: {}, a: {}}", "bad.yaml line 1: 'a' stands twice"),
        ("axes:\n  lr: [1]\n  lr: [2]", "bad.yaml line 3: 'lr' stands twice"),
        ("axes: [", "bad.yaml line 1: not valid YAML"),
        ("- a", "bad.yaml: not a mapping"),
    ],
)
def test_bad_yaml_names_the_line(text, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("bad.yaml").write_text(text)
    assert main(["sweep", "bad.yaml"]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["none.yaml"], "there is no grid file none.yaml"),
        (["good.yaml", "--slots", "cpu:0"], "--slots cpu:0: no slots"),
        (["good.yaml", "--slots", ""], "no slots; write 0,1,2,3 or cpu:2"),
        (["good.yaml", "--slots", "a,b"], "--slots a,b: 'a' is no GPU id"),
        (["good.yaml", "--slots", "0,0"], "cell good: gpus_per_cell: 2 slots, but there are 1"),
        (["good.yaml", "--slurm", "timeout_min=3"], "--slurm needs --executor slurm"),
        (["good.yaml", "--executor", "slurm", "--slots", "0"], "--slots is for --executor local"),
        (["good.yaml", "--executor", "slurm", "--slurm", "partition"], "--slurm partition: write KEY=VALUE"),
        (["good.yaml", "--executor", "slurm", "--slurm", "cluster=pbs"], "--slurm cluster=pbs: there are slurm, local"),
        (
            ["good.yaml", "--executor", "slurm", "--slurm", "cluster=local", "colour=red"],
            "--slurm: Unknown argument 'colour'",
        ),
        (["good.yaml", "--executor", "slum"], "invalid choice: 'slum'"),
    ],
)
def test_bad_command_line_is_one_sentence_and_nothing_starts(options, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("good.yaml").write_text("gpus_per_cell: 2")
    assert main(["sweep", *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["good.yaml"]
