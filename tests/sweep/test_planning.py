"""The real CLI says what a cell would do, and what it then does is recognised as done."""

from pathlib import Path

import pytest
import yaml
from sweep_small import SMALL

from kvc.__main__ import main
from kvc.errors import UserError
from kvc.planning import plan
from kvc.runs import flatten
from kvc.sweep.cells import Cell
from kvc.sweep.state import Disk


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KVC_CACHE", str(tmp_path / "cache"))
    Path("small.yaml").write_text(yaml.safe_dump(SMALL))
    return tmp_path


def test_a_plan_names_folder_and_configuration_and_writes_nothing(here):
    before = sorted(here.rglob("*"))
    found = plan(["fit", "--config", "small.yaml", "--run_dir", "runs/x", "--model.optim.lr", "3e-4"], {})
    assert found.folder == Path("runs/x")
    assert flatten(found.config)["model.init_args.optim.lr"] == 3e-4
    assert (found.trained, found.overwrite) == (None, ("--overwrite", "true"))
    assert sorted(here.rglob("*")) == before


def test_runs_are_recognised_as_done_and_changed_ones_as_stale(here):
    """A fit and an evaluation of it, both planned before the first exists, then run for real."""
    fit_words = ["fit", "--config", "small.yaml", "--run_dir", "runs/a"]
    test_words = ["test", "--run", "runs/a", "--data.init_args.steps", "[4, 5]", "--eval_name", "deep"]
    fit_plan = plan(fit_words, {})
    test_plan = plan(test_words, {Path("runs/a").resolve(): fit_plan.config})
    assert test_plan.folder == Path("runs/a/eval/deep")
    assert test_plan.trained == Path("runs/a")
    fit = Cell("a", "", tuple(fit_words), fit_plan.folder, plan=fit_plan)
    test = Cell("deep", "", tuple(test_words), test_plan.folder, ("a",), plan=test_plan)
    disk = Disk(Path("runs"), [fit, test])
    assert [disk.look(cell).state for cell in (fit, test)] == ["missing", "missing"]
    assert main(fit_words) == 0
    assert [disk.look(cell).state for cell in (fit, test)] == ["done", "missing"]
    assert main(test_words) == 0
    assert [disk.look(cell).state for cell in (fit, test)] == ["done", "done"]

    changed = plan([*fit_words, "--model.optim.lr", "0.5"], {})
    look = disk.look(Cell("a", "", tuple(fit_words), changed.folder, plan=changed))
    assert look.state == "stale"
    assert look.why == "model.init_args.optim.lr: 0.01 there, 0.5 here"
    Path("runs/a/result.json").unlink()
    assert disk.look(fit).state == "begun"
    Path("runs/a/result.json").write_text('{"identity": "other"}')
    assert disk.look(fit).why == "its result belongs to another configuration"
    best = Path("runs/a/checkpoints/best.ckpt")
    best.write_bytes(best.read_bytes() + b"more")
    assert disk.look(test).state == "stale", "another checkpoint needs another evaluation"


def test_a_wrong_cell_is_named_before_any_starts(here, capsys):
    Path("grid.yaml").write_text(
        "base: small.yaml\naxes: {model.init_args.optim.lr: [0.1, fast]}\nset: {data.init_args.batch_size: 2}"
    )
    assert main(["sweep", "grid.yaml", "--slots", "cpu:1"]) == 2
    error = capsys.readouterr().err
    assert error == "kvc: error: grid.yaml: cell lr=fast: model.optim.lr: expected float, got fast\n"
    assert not Path("runs").exists()


def test_two_cells_that_write_one_folder_are_refused(here, capsys):
    Path("grid.yaml").write_text(
        "stages:\n  train: {base: small.yaml}\n"
        "  check: {command: test, set: {run: '{train.run_dir}', eval_name: x}, "
        "axes: {data.init_args.steps: [[2, 3], [4, 5]]}}"
    )
    assert main(["sweep", "grid.yaml", "--slots", "cpu:1"]) == 2
    assert "the cells check/steps=2-3 and check/steps=4-5 both write runs/grid/train/eval/x" in capsys.readouterr().err


def test_other_commands_are_parsed_by_their_own_parsers():
    assert plan(["compare", "runs/a", "--csv", "x.csv"], {}).overwrite == ()
    assert plan(["annotate", "--input", "a", "--output", "b"], {}).overwrite == ("--overwrite",)
    for words, message in (
        (["annotate", "--num_samples", "0"], "must be at least 1"),
        (["compare"], "RUN"),
        (["compare", "--help"], "only prints its help"),
        (["sweeep"], "no command 'sweeep'"),
    ):
        with pytest.raises(UserError, match=message):
            plan(words, {})
