"""The run folder: what it holds, when it may be written, how it is read back.

RUN/config.yaml            the truth: everything the run was started with
RUN/checkpoints/last.ckpt  resume from here        best.ckpt  evaluate this
RUN/events.out.tfevents.*  TensorBoard
RUN/eval/NAME/             config.yaml, predictions.jsonl, result.json and pictures of one evaluation
RUN/result.json            written last: the run is finished
"""

import fcntl
import json
import platform
import shutil
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any

import yaml

from kvc import __version__
from kvc.core.files import digest, write_text
from kvc.errors import UserError

RUNS = Path("runs")
CONFIG, RESULT, PREDICTIONS = "config.yaml", "result.json", "predictions.jsonl"

NOT_IDENTITY = {
    *("config", "run_dir", "name", "overwrite", "run", "eval_name", "wandb", "save_every", "ckpt_path", "verbose"),
    *("weights_only", "return_predictions"),
    *(f"trainer.{key}" for key in ("accelerator", "strategy", "devices", "num_nodes", "logger", "profiler")),
    *(f"trainer.{key}" for key in ("log_every_n_steps", "default_root_dir", "enable_progress_bar", "barebones")),
    *(f"trainer.{key}" for key in ("enable_model_summary", "enable_checkpointing", "detect_anomaly", "plugins")),
    *(f"trainer.{key}" for key in ("num_sanity_val_steps", "benchmark", "use_distributed_sampler")),
    "data.init_args.num_workers",
    "data.init_args.cache_dir",
}
"""Dotted keys that say where and how a run is executed, not what it computes."""


@dataclass(frozen=True)
class RunFolder:
    """One folder with one identity.

    Attributes:
        path: The folder.
    """

    path: Path

    @property
    def config(self) -> Path:
        """The configuration the folder was started with."""
        return self.path / CONFIG

    @property
    def result(self) -> Path:
        """Written last: its presence means finished."""
        return self.path / RESULT

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def last(self) -> Path:
        """Checkpoint to resume from."""
        return self.checkpoints / "last.ckpt"

    def best(self) -> Path:
        """Checkpoint to evaluate: the best by the method's monitor, else the last.

        Raises:
            UserError: If there is none.
        """
        for path in (self.checkpoints / "best.ckpt", self.last):
            if path.is_file():
                return path
        raise UserError(f"{self.path} holds no checkpoint: a trained method is never evaluated without one")

    def evaluation(self, name: str) -> "RunFolder":
        """The folder of one evaluation of this run."""
        if not name or "/" in name or name.startswith("."):
            raise UserError(f"eval_name: '{name}' is not a folder name")
        return RunFolder(self.path / "eval" / name)

    def read_config(self) -> dict[str, Any]:
        """Parse `config.yaml`.

        Raises:
            UserError: If the folder is no run folder.
        """
        if not self.path.is_dir():
            raise UserError(f"there is no run folder {self.path}")
        if not self.config.is_file():
            raise UserError(f"{self.path} holds no {CONFIG}, so it is not a run folder")
        return read_yaml(self.config)

    def claim(self, config: dict[str, Any], overwrite: bool) -> "Claim":
        """Take the folder for `config`: create it, continue it, or refuse.

        Args:
            config: Full configuration.
            overwrite: Replace what the folder holds, if it is a run folder.

        Returns:
            The claim, to be kept when work begins, or undone.

        Raises:
            UserError: If it belongs to another configuration, is no run folder, or cannot be written.
        """
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path} is a file, not a run folder")
        lock = lock_folder(self.path)
        occupied = self.path.is_dir() and any(self.path.iterdir())
        if occupied and not self.config.is_file():
            raise UserError(f"{self.path} is not empty and holds no {CONFIG}: choose another --run_dir")
        if occupied and not overwrite:
            if changed := differences(self.read_config(), config):
                raise UserError(
                    f"{self.path} was started with another configuration ({'; '.join(changed[:3])}): "
                    "choose another --name, or pass --overwrite to discard it"
                )
            return Claim(self.path, known=True, lock=lock)
        missing = [path for path in (self.path, *self.path.parents) if not path.exists()]
        claim = Claim(self.path, known=False, made=missing, lock=lock)
        try:
            if occupied:
                claim.replaced = self.path.with_name(f".{self.path.name}.replaced")
                shutil.rmtree(claim.replaced, ignore_errors=True)
                self.path.rename(claim.replaced)
            self.path.mkdir(parents=True, exist_ok=True)
            write_text(self.config, yaml.safe_dump(config, sort_keys=False))
        except OSError as error:
            claim.undo()
            raise UserError(f"cannot write to the run folder {self.path}: {error.strerror}") from error
        return claim

    def read_result(self) -> dict[str, Any]:
        """Parse `result.json`.

        Raises:
            UserError: If it is missing or broken.
        """
        if not self.result.is_file():
            raise UserError(f"{self.path} holds no {RESULT}: the run is not finished, or is no run folder")
        try:
            result = json.loads(self.result.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise UserError(f"{self.result} is not valid JSON (line {error.lineno}): {error.msg}") from error
        except UnicodeDecodeError as error:
            raise UserError(f"{self.result} is not UTF-8 text") from error
        if not isinstance(result, dict):
            raise UserError(f"{self.result} is not a JSON object")
        return result


@dataclass
class Claim:
    """A run folder that was taken. Until work in it begins, taking it can be undone.

    Attributes:
        path: The folder.
        known: Whether it was started before with the same identity; then there is nothing to undo.
        made: Folders that did not exist before, innermost first.
        replaced: Where the former content waits.
        lock: Held open for as long as the claim is.
    """

    path: Path
    known: bool
    made: list[Path] = field(default_factory=list)
    replaced: Path | None = None
    lock: IO[str] | None = None

    def keep(self) -> None:
        """Discard what was replaced."""
        self.known = True
        if self.replaced is not None:
            shutil.rmtree(self.replaced, ignore_errors=True)

    def undo(self) -> None:
        """Leave the disk as it was found, unless the claim was kept."""
        # Forked ranks keep the claim in a memory of their own: what they wrote must not be lost either.
        if self.known or any(self.path.rglob("*.ckpt")):
            return
        if self.replaced is None or self.replaced.exists():
            shutil.rmtree(self.path, ignore_errors=True)
        if self.replaced is not None and self.replaced.exists():
            self.replaced.rename(self.path)
        elif not self.made:
            self.path.mkdir(exist_ok=True)
        for folder in self.made:
            with suppress(OSError):  # another run may have moved in beside this one
                folder.rmdir()


def lock_folder(folder: Path) -> IO[str]:
    """Keep other processes out of a run folder; the lock ends with the process, however it ends.

    Raises:
        UserError: If another process is at work there.
    """
    name = f"kvc-{digest(str(folder.resolve()))}.lock"
    file = (Path(tempfile.gettempdir()) / name).open("w")
    try:
        # A record lock: unlike flock's it is not inherited by loader workers, which outlive a killed run for seconds.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise UserError(f"{folder} is in use by another process") from None
    return file


def read_yaml(path: Path) -> dict[str, Any]:
    """Parse a file of settings.

    Raises:
        UserError: If it is not a mapping in YAML; the sentence names file and line.
    """
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark is not None else ""
        raise UserError(f"{path}{where}: not valid YAML: {getattr(error, 'problem', error)}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as UTF-8 text") from error
    if not isinstance(config, dict):
        raise UserError(f"{path}: not a mapping of settings")
    return config


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dicts to dotted keys."""
    if not isinstance(config, dict) or not config:
        return {prefix: config}
    items: dict[str, Any] = {}
    for key, value in config.items():
        items.update(flatten(value, f"{prefix}.{key}" if prefix else str(key)))
    return items


def identity_of(config: dict[str, Any]) -> dict[str, Any]:
    """The settings that decide what a run computes, by dotted key."""
    return {
        key: value
        for key, value in flatten(config).items()
        if not any(key == k or key.startswith(k + ".") for k in NOT_IDENTITY)
    }


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Settings of the identity that differ, as readable phrases."""
    a, b = identity_of(before), identity_of(now)
    return [f"{k}: {a.get(k)!r} there, {b.get(k)!r} here" for k in sorted(a.keys() | b.keys()) if a.get(k) != b.get(k)]


def identity_hash(config: dict[str, Any]) -> str:
    """A name of what a run computes."""
    return digest(json.loads(json.dumps(identity_of(config), default=str)))


def provenance() -> dict[str, Any]:
    """Versions, git state and machine, for `result.json`."""
    packages = ("kvc", "torch", "lightning", "transformers", "peft", "torchmetrics", "datasets", "numpy")
    return {
        "versions": {"python": platform.python_version(), **{p: _version(p) for p in packages}},
        "git": _git(),
        "machine": machine(),
        "argv": " ".join(["kvc", *sys.argv[1:]]) if sys.argv[0].endswith(("kvc", "__main__.py")) else "",
    }


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    import os

    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"system": platform.system(), "processor": platform.machine(), "cpus": os.cpu_count(), "gpus": gpus}


def _version(package: str) -> str:
    try:
        return __version__ if package == "kvc" else version(package)
    except PackageNotFoundError:
        return "not installed"


def _git() -> dict[str, Any]:
    """Commit and cleanliness of the checkout that kvc is imported from; empty outside one."""
    folder = Path(__file__).resolve().parents[1]
    if not (folder / ".git").exists():
        return {}

    def ask(*words: str) -> str:
        return subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=10).stdout

    try:
        return {
            "commit": ask("rev-parse", "--verify", "--quiet", "HEAD").strip(),
            "dirty": bool(ask("status", "--porcelain").strip()),
        }
    except (OSError, subprocess.TimeoutExpired):
        return {}
