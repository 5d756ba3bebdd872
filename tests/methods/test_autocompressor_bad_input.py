"""What does not fit is one clear sentence and exit code 2, by the command line."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import cases
import pytest
import torch


def one_step(tiny_folder: Path, **settings: Any) -> cases.Config:
    config = cases.autocompressor_config(tiny_folder)
    config["trainer"]["max_epochs"] = 1
    config["model"]["init_args"] |= settings
    config["data"]["init_args"] |= {"counts": [4, 1, 1]}
    return config


def sentence(capsys: pytest.CaptureFixture[str]) -> str:
    """The only line about the error."""
    said = capsys.readouterr()
    assert "Traceback" not in said.err + said.out
    lines = [line for line in said.err.splitlines() if "rror:" in line]
    assert len(lines) == 1, said.err
    return lines[0]


SUMMARY = "kvc.methods.autocompressor.summaries.Variable"


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (
            {"segment_lengths": [100, 60], "randomize_substeps": False},
            "data.block_size: 280 tokens are fewer than the 320 that model.training_substeps 2 and "
            "model.segment_lengths [100, 60] need",
        ),
        ({"segments_per_substep": 80}, "data.block_size: 280 tokens are too few"),
        ({"min_segment_length": 90}, "cannot be cut into 2 segments of at least 90"),
        (
            {"summary": {"class_path": SUMMARY, "init_args": {"control_tokens": "vocabulary"}}},
            "the tokenizer has no token <sum>: add <sum> and <eoc> to it",
        ),
    ],
)
def test_settings_that_do_not_fit(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], settings: dict[str, Any], expected: str
) -> None:
    assert cases.fit(one_step(tiny_folder, **settings), tmp_path / "run") == 2
    assert expected in sentence(capsys)
    assert not (tmp_path / "run" / "result.json").exists()


def test_a_checkpoint_of_another_width(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert cases.fit(one_step(tiny_folder), run) == 0

    def changed(change: Callable[[torch.Tensor], torch.Tensor]) -> str:
        for path in (run / "checkpoints").iterdir():
            state = torch.load(path, weights_only=True)
            table = state["state_dict"]["summary.embed_summary.weight"]
            state["state_dict"]["summary.embed_summary.weight"] = change(table)
            torch.save(state, path)
        capsys.readouterr()
        assert cases.main(["test", "--run", str(run), "--eval_name", "again"]) == 2
        return sentence(capsys)

    wider = changed(lambda table: torch.cat([table, table], dim=1))
    assert "summary.embed_summary.weight: [3, 64], here [3, 32]" in wider
    longer = changed(lambda table: torch.cat([table[:, :32], table[:, :32]]))
    assert "summary.embed_summary.weight: [6, 32], here [3, 32]" in longer
