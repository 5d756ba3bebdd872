"""`compare` with pictures: what it writes, and what it leaves alone when something is wrong."""

from pathlib import Path

import pytest
from cases import comp_config, fit
from finished_runs import make_run

from kvc.__main__ import main


def test_plots_are_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [str(make_run(tmp_path / name, budget)) for name, budget in (("a", 8), ("b", 64))]
    assert main(["compare", *runs, "--png", str(tmp_path / "plots"), "--metric", "exact_match", "perplexity"]) == 0
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == [
        "curves_val_loss.png",
        "quality_exact_match_against_kv_bytes_peak.png",
        "quality_perplexity_against_kv_bytes_peak.png",
    ]
    for path in (tmp_path / "plots").iterdir():
        assert path.read_bytes().startswith(b"\x89PNG")
    assert f"wrote 3 plots to {tmp_path / 'plots'}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--html", "."], "--html .: that is a folder, not a file"),
        (["--html", "file/report.html"], "cannot write"),
        (["--png", "file"], "--png file: that is a file, not a folder"),
        (["--tensorboard", "file"], "--tensorboard file: that is a file, not a folder"),
        (["--tensorboard", "full"], "--tensorboard full: the folder is not empty and holds no earlier comparison"),
        (["--html", "report.html", "--x", "memory"], "--x memory: no run has it; there are kv_bytes_peak"),
        (["--html", "report.html", "--samples", "-1"], "--samples -1: give 0 or more"),
        (["--html", "report.html", "--samples", "many"], "--samples"),
    ],
)
def test_bad_options(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    sentence: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    make_run(Path("run"))
    Path("file").write_text("mine")
    Path("full").mkdir()
    Path("full/thing").write_text("mine")
    assert main(["compare", "run", *options]) == 2
    err = capsys.readouterr().err
    assert sentence in err
    assert len(err.splitlines()) == 1
    assert not Path("report.html").exists()
    assert (Path("file").read_text(), Path("full/thing").read_text()) == ("mine", "mine")
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith(".")]


def test_options_without_effect_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(make_run(tmp_path / "a")), "--x", "kept", "--samples", "3"]) == 0
    out = capsys.readouterr().out
    assert "warning: --x has no effect without --html, --png or --tensorboard" in out
    assert "warning: --samples has no effect without --html" in out


def test_what_was_written_before_is_no_run(tmp_path: Path) -> None:
    make_run(tmp_path / "a")
    options = [f"--{kind}={tmp_path / kind}" for kind in ("html", "png", "tensorboard")]
    for _ in range(2):
        assert main(["compare", *map(str, sorted(tmp_path.iterdir())), *options]) == 0


def test_a_real_run(tmp_path: Path, tiny_folder: Path) -> None:
    config = comp_config(tiny_folder)
    config["trainer"]["enable_model_summary"] = False
    run = tmp_path / "real"
    assert fit(config, run) == 0
    page = tmp_path / "page.html"
    assert main(["compare", str(run), "--html", str(page)]) == 0
    text = page.read_text()
    for part in ("average_precision", "val/loss", "trainable parameters", "classifier.png of real", 'class="gold"'):
        assert part in text
    assert 'src="data:image/png' in text
    # The evaluation below the run gives the same curves and samples.
    assert main(["compare", str(run / "eval" / "test"), "--html", str(page)]) == 0
    assert "val/loss" in page.read_text()
