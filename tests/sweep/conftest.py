"""A sweep over a stub program: what cells do costs nothing, so tests see how they are run."""

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from sweep_stub import stub_config

from kvc.__main__ import main
from kvc.sweep.plan import Plan

STUB = (sys.executable, "-I", "-S", str(Path(__file__).parent / "sweep_stub.py"))


class StubSweep:
    """Grid file, root and hold folder of one test."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.root, self.hold = folder, folder / "root", folder / "hold"
        self.hold.mkdir()

    def grid(self, **content: Any) -> str:
        path = self.folder / "grid.yaml"
        path.write_text(yaml.safe_dump(content, sort_keys=False))
        return str(path)

    def run(self, *options: str, grid: str | None = None) -> int:
        return main(["sweep", grid or str(self.folder / "grid.yaml"), "--root", str(self.root), *options])

    def keep(self, *names: str) -> None:
        for name in names:
            (self.hold / name).touch()

    def release(self, *names: str) -> None:
        for name in names:
            (self.hold / name).unlink(missing_ok=True)

    def result(self, cell: str) -> dict[str, Any]:
        return json.loads((self.root / cell / "result.json").read_text())

    def history(self) -> list[str]:
        """Lines of sweep.log without their times."""
        text = (self.root / ".sweep" / "sweep.log").read_text()
        return [line.split(" ", 2)[2] for line in text.splitlines()]

    def started(self) -> list[str]:
        """Cells in the order in which they were started."""
        return [line.split(" started ")[0] for line in self.history() if " started on " in line]


def stub_plan(argv: list[str], planned: Mapping[Path, dict[str, Any]]) -> Plan:
    config = stub_config(argv)
    return Plan(Path(str(config["run_dir"])), config, None, ("--overwrite", "true"))


@pytest.fixture
def stub_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StubSweep:
    sweep = StubSweep(tmp_path)
    monkeypatch.setenv("STUB_HOLD", str(sweep.hold))
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setattr("kvc.sweep.process.PROGRAM", STUB)
    monkeypatch.setitem(sys.modules, "kvc.planning", SimpleNamespace(plan=stub_plan))
    return sweep


@pytest.fixture
def on_update(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Any], None]], None]:
    """Calls a function with the board at every turn of the sweep's loop."""
    from kvc.sweep.status import History

    def install(function: Callable[[Any], None]) -> None:
        update = History.update

        def update_and_call(self: History, board: Any) -> None:
            update(self, board)
            function(board)

        monkeypatch.setattr(History, "update", update_and_call)

    return install
