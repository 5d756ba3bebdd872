import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kvc.__main__ import COMMANDS, TRAINER_COMMANDS, main


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_script_names_every_command(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    # tcsh completes the options of no command but the first.
    options = () if shell == "tcsh" else ("--config", "--run_dir", "--metric", "--private")
    for name in (*TRAINER_COMMANDS, *COMMANDS, *options):
        assert name in script


def test_bash_completes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("there is no bash")
    main(["completion", "bash"])
    script = tmp_path / "kvc.bash"
    script.write_text(capsys.readouterr().out)
    (tmp_path / "runs" / "first").mkdir(parents=True)
    (tmp_path / "my.yaml").write_text("")
    subprocess.run([bash, "-n", script], check=True)

    def complete(*words: str) -> set[str]:
        line = " ".join(f"'{word}'" for word in ("kvc", *words))
        code = f'. "$0"; COMP_WORDS=({line}); COMP_CWORD={len(words)}; _shtab_kvc; printf "%s\\n" "${{COMPREPLY[@]}}"'
        done = subprocess.run([bash, "-c", code, script], capture_output=True, text=True, check=True, cwd=tmp_path)
        return set(done.stdout.split())

    assert complete("") >= {*TRAINER_COMMANDS, *COMMANDS}
    assert complete("exp") == {"export"}
    assert complete("fit", "--run") == {"--run", "--run_dir"}
    assert complete("fit", "--overwrite", "t") == {"true"}
    assert complete("fit", "--config", "my") == {"my.yaml"}
    assert complete("test", "--run", "runs/f") == {"runs/first"}
    assert complete("compare", "runs/f") == {"runs/first"}
    assert complete("completion", "z") == {"zsh"}


def test_stays_light() -> None:
    code = (
        "import sys; from kvc.__main__ import main; main(['completion', 'bash']); "
        "sys.exit(bool({'torch', 'lightning', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL).returncode == 0


def test_bad_shell(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "cmd"]) == 2
