"""The bar counts every token, the last included, and writes nothing where nobody looks."""

import io
import re

import pytest
from rich.console import Console

from kvc.generation.progress import DecodeProgress


def terminal(forced: bool = True) -> Console:
    return Console(file=io.StringIO(), force_terminal=forced, width=160, color_system=None)


def written(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue())


def test_the_last_token_is_counted() -> None:
    console = terminal()
    with DecodeProgress(7, rows=3, console=console) as bar:
        for step in range(7):
            alive = 3 if step < 4 else 1
            bar.step(new_tokens=alive, alive=alive - (step == 6), cached=1200 + step, compressions=step // 2)
    last = written(console).strip().splitlines()[-1]
    assert "7/7" in last
    assert "3 of 3 rows finished" in last
    assert "1,206 tokens in memory" in last
    assert "3 compressions" in last


def test_a_decode_that_ends_early_shows_what_it_did() -> None:
    console = terminal()
    with DecodeProgress(100, rows=2, console=console) as bar:
        bar.step(new_tokens=2, alive=1, cached=10, compressions=0)
        assert "- tokens/s" in last_description(bar)
        bar.step(new_tokens=1, alive=0, cached=11, compressions=0)
        assert re.search(r"[\d,]+ tokens/s", last_description(bar))
    last = written(console).strip().splitlines()[-1]
    assert "2/100" in last
    assert "2 of 2 rows finished" in last


def last_description(bar: DecodeProgress) -> str:
    return bar._bar.tasks[0].description


def test_the_rate_leaves_the_first_step_out(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([10.0, 12.0, 14.0])
    monkeypatch.setattr("kvc.generation.progress.time.monotonic", lambda: next(clock))
    bar = DecodeProgress(9, rows=8, console=terminal())
    for tokens in (800, 8, 4):
        bar.step(new_tokens=tokens, alive=4, cached=1, compressions=0)
    assert last_description(bar).endswith(", 3 tokens/s")


def test_the_bar_is_gone_when_decoding_fails() -> None:
    console = terminal()
    with pytest.raises(RuntimeError), DecodeProgress(3, rows=1, console=console) as bar:
        raise RuntimeError
    assert not bar._bar.live.is_started


@pytest.mark.parametrize(("forced", "enabled"), [(False, True), (True, False)])
def test_silent_without_a_terminal_or_when_switched_off(forced: bool, enabled: bool) -> None:
    console = terminal(forced)
    with DecodeProgress(3, rows=1, console=console, enabled=enabled) as bar:
        bar.step(new_tokens=1, alive=1, cached=1, compressions=0)
    assert written(console) == ""


def test_text_on_standard_output_stays_clean(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    with DecodeProgress(3, rows=1) as bar:
        bar.step(new_tokens=1, alive=1, cached=1, compressions=0)
        print("text")
    out, err = capsys.readouterr()
    assert out == "text\n"
    assert "1 tokens in memory" in err
