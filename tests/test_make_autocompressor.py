"""`make autocompressor`: which configuration it takes, and batches that cannot be."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


def recipe(*settings: str) -> list[str]:
    """The commands that it would run, without those of the installation."""
    done = subprocess.run(
        ["make", "--no-print-directory", "-n", "autocompressor", *settings],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    lines = done.stdout.replace("\\\n", " ").splitlines()
    return lines[next(i for i, line in enumerate(lines) if line.startswith("test $((")) :]


@pytest.mark.parametrize(
    ("base", "config", "pretrained"),
    [
        ("opt-125m", "opt_125m", "facebook/opt-125m"),
        ("tiny", "tiny_variable", "tiny"),
        ("meta-llama/Llama-2-7b-hf", "llama2_7b_6k", "meta-llama/Llama-2-7b-hf"),
        ("meta-llama/Llama-3.1-8B", "llama3_8b", "meta-llama/Llama-3.1-8B"),
    ],
)
def test_blocks_are_of_the_tokenizer_of_the_base(base: str, config: str, pretrained: str) -> None:
    command = recipe(f"BASE={base}")[-1]
    assert f"--config configs/autocompressor/{config}.yaml " in command
    assert f"--model.backbone.pretrained {pretrained} " in command
    assert "compression_max_len 50 " in command
    assert "lr 2e-5 " in command
    assert (ROOT / "configs" / "autocompressor" / f"{config}.yaml").is_file()


@pytest.mark.parametrize(("batch", "gpus", "code"), [(3, 2, 2), (1, 2, 2), (0, 1, 2), (32, 4, 0)])
def test_a_batch_is_a_multiple_of_the_devices(batch: int, gpus: int, code: int) -> None:
    check = recipe(f"BATCH={batch}", f"NUM_GPUS={gpus}")[0]
    done = subprocess.run(["sh", "-c", check], capture_output=True, text=True, check=False)
    assert done.returncode == code
    assert done.stderr == (f"BATCH={batch} is no multiple of NUM_GPUS={gpus}\n" if code else "")
