"""The pooled table of CCM runs: made-up runs of known numbers."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from experiments.ccm_reasoning import main, picture
from kvc.core.results import Value


def scores(exact: bool, share: float) -> dict[str, Any]:
    about = {
        "right": 4 if exact else 1,
        "tokens": 4,
        "nll": 0.4,
        "kv_tokens_peak": 20.0,
        "kv_tokens_final": 9.0,
        "kv_bytes_peak": 200.0,
        "kv_bytes_final": 90.0,
        "kv_share": share,
    }
    return {"exact": exact, **about}


def run(folder: Path, seed: int, kind: str, hits: int, **model: Any) -> str:
    """Ten traces, of which the arm gets `hits` right; the full context all, no context one."""
    (folder / "eval" / "test").mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({"model": {"init_args": {"kind": kind, "slots": 4, **model}}}))
    (folder / "result.json").write_text(json.dumps({"seed": seed, "data": {"hash": "one"}}))
    records = [
        {
            "id": number,
            "arms": {
                "method": scores(number < hits, 1.0 if kind == "full" else 0.1),
                "full": scores(True, 1.0),
                "no_context": scores(number < 1, 0.0),
            },
        }
        for number in range(10)
    ]
    (folder / "eval" / "test" / "predictions.jsonl").write_text("\n".join(map(json.dumps, records)))
    return str(folder)


def both_seeds(folder: Path) -> list[str]:
    return [
        run(folder / f"{kind}-{seed}", seed, kind, hits)
        for seed, kinds in {1: {"full": 9, "concat_recur": 7}, 2: {"full": 9, "concat_recur": 5}}.items()
        for kind, hits in kinds.items()
    ]


def test_a_trace_counts_once_whatever_the_seeds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, png = tmp_path / "out.json", tmp_path / "out.png"
    assert main([*both_seeds(tmp_path), "--out", str(out), "--png", str(png)]) == 0
    result = json.loads(out.read_text())
    assert result["n"] == 10
    ours = result["arms"]["concat n=4"]
    assert ours["exact"]["value"] == pytest.approx(0.6)
    assert ours["recovered"]["value"] == pytest.approx((12 - 2) / (18 - 2))
    assert ours["recovered"]["low"] < 0.6 < ours["recovered"]["high"]
    assert ours["by_seed"] == [0.7, 0.5]
    assert ours["kv_share"]["value"] == pytest.approx(0.1)
    assert result["control_minus_arm"]["exact"]["concat n=4"]["value"] == pytest.approx(0.3)
    assert list(result["arms"]) == ["control", "full", "no_context", "concat n=4"]
    assert [source["seed"] for source in result["runs"]] == [1, 1, 2, 2]
    assert "| concat n=4 | 0.600 [" in capsys.readouterr().out
    assert png.read_bytes().startswith(b"\x89PNG")


def test_what_cannot_be_compared_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs, out = both_seeds(tmp_path), tmp_path / "out.json"
    twice = run(tmp_path / "again", 2, "concat_recur", 5)
    for words, given in (
        ("'concat n=4' was not measured with every seed", runs[:3]),
        ("a second run of 'concat n=4' with the seed 2", [*runs, twice]),
        ("no run of the control", runs[1::2]),
        ("not finished", [*runs, str(tmp_path)]),
    ):
        assert main([*given, "--out", str(out)]) == 2
        assert words in capsys.readouterr().err
    assert not out.exists()


def test_bars_end_where_the_interval_ends() -> None:
    """Also at zero, where an arm is never right."""
    known = {"exact": Value(1.0, 1.0, 1.0, 4), "kv_share": Value(1.0, 1.0, 1.0, 4)}
    never = {"exact": Value(0.0, 0.0, 0.0, 4), "kv_share": Value(0.1, 0.1, 0.1, 4)}
    figure = picture({"control": known, "full": known, "no_context": never, "concat n=1": never})
    (bars,) = figure.axes[0].containers
    ((low, high),) = bars.lines[2][0].get_segments()
    assert (low[1], high[1]) == (0.0, 0.0)
