"""Budgets per layer, and the line that tells of a compression."""

from itertools import pairwise

import pytest

from kvc.errors import UserError
from kvc.eviction import debug
from kvc.eviction.budgets import pyramid, uniform


@pytest.mark.parametrize("layers", [1, 2, 3, 7, 32])
@pytest.mark.parametrize(("budget", "floor"), [(80, 0), (101, 8), (1024, 88)])
@pytest.mark.parametrize("beta", [1.0, 4.0, 20.0])
def test_a_pyramid_keeps_the_total_and_falls(layers: int, budget: int, floor: int, beta: float) -> None:
    budgets = pyramid(budget, layers, beta, floor)
    assert len(budgets) == layers
    assert sum(budgets) == budget * layers
    assert all(b > floor for b in budgets)
    assert all(later <= earlier + 1 for earlier, later in pairwise(budgets))
    if layers > 1 and beta > 1:
        assert abs(budgets[-1] - floor - (budget - floor) / beta) <= 1


def test_the_pyramid_of_the_paper() -> None:
    assert pyramid(80, 3, beta=4) == [140, 80, 20]
    assert uniform(80, 3) == [80, 80, 80]


def test_bad_pyramids() -> None:
    with pytest.raises(UserError, match="beta"):
        pyramid(80, 3, beta=0.5)
    with pytest.raises(UserError, match="budget"):
        pyramid(8, 3, floor=8)


@pytest.mark.parametrize("value", ["1", "true", "YES", "on"])
def test_the_line_of_the_brief(value: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setenv("RKV_DEBUG_COMPRESSION", value)
    debug.report(0, 2048, 1312, next_position=1312)
    debug.report(3, 2048, 1312, next_position=2048, rotation_target=2048)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == (
        "[R1KV][layer 0] compressed cache 2048 -> 1312 (rotated=False, rotation_offset=n/a, next_pos=1312)"
    )
    assert lines[1].endswith("(rotated=True, rotation_offset=2048, next_pos=2048)")


@pytest.mark.parametrize("value", [None, "", "0", "no"])
def test_silent_unless_asked(value: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.delenv("RKV_DEBUG_COMPRESSION", raising=False)
    if value is not None:
        monkeypatch.setenv("RKV_DEBUG_COMPRESSION", value)
    debug.report(0, 2048, 1312, next_position=1312)
    assert capsys.readouterr() == ("", "")
