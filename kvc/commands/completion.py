"""`python -m kvc completion`: the script that makes a shell complete kvc's commands and options."""

import argparse
import sys
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from kvc.__main__ import COMMANDS, TRAINER_COMMANDS
from kvc.commands import CommandParser

EPILOG = """\
examples:
  eval "$(kvc completion bash)"                                  (this shell)
  kvc completion bash > ~/.local/share/bash-completion/completions/kvc
  kvc completion zsh > ~/.zfunc/_kvc                             (a folder of $fpath)
"""
SHELLS = ("bash", "zsh", "tcsh")

# What an option's value is: "file" and "folder" are completed from the disk, a tuple lists the values.
BOOL = ("true", "false")
TRAINER_OPTIONS: dict[str, tuple[str | tuple[str, ...] | None, str]] = {
    "--config": ("file", "YAML file; may be given several times"),
    "--name": (None, "short for --run_dir runs/NAME"),
    "--run_dir": ("folder", "folder of the run"),
    "--run": ("folder", "evaluate this trained run"),
    "--overwrite": (BOOL, "discard what the folder holds"),
    "--eval_name": (None, "name of the evaluation"),
    "--save_every": (None, "steps between resumable checkpoints"),
    "--wandb": (BOOL, "also log to Weights and Biases"),
    "--seed_everything": (None, "the one seed"),
    "--trainer": ("file", "YAML file of the Trainer"),
    "--model": ("file", "class of the method, or its YAML file"),
    "--data": ("file", "class of the data, or its YAML file"),
}


def parser() -> argparse.ArgumentParser:
    """Arguments of the command itself."""
    result = CommandParser(
        prog="python -m kvc completion",
        description="Print a shell completion script for the command kvc.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument("shell", choices=SHELLS, help="shell to write the script for")
    return result


def main(argv: list[str]) -> int:
    """Print the script.

    Args:
        argv: Arguments after `completion`.

    Returns:
        Exit code.
    """
    options = parser().parse_args(argv)
    import shtab

    sys.stdout.write(shtab.complete(command_line(), options.shell).rstrip("\n") + "\n")
    return 0


def command_line() -> argparse.ArgumentParser:
    """All commands with their main options; parses nothing, and imports neither torch nor a method."""
    root = argparse.ArgumentParser(prog="kvc", description="Train, run and compare context and KV-cache compression.")
    root.add_argument("-V", "--version", action="store_true", help="print the version")
    commands = root.add_subparsers(dest="command")
    for name, text in TRAINER_COMMANDS.items():
        _trainer_options(commands.add_parser(name, description=text, help=text))
    for name, text in COMMANDS.items():
        target = commands.add_parser(name, description=text, help=text)
        if find_spec(f"kvc.commands.{name}") is None:
            continue
        own = import_module(f"kvc.commands.{name}")
        if hasattr(own, "parser"):
            _copy(own.parser(), target)
    return root


def _trainer_options(target: argparse.ArgumentParser) -> None:
    for option, (kind, text) in TRAINER_OPTIONS.items():
        if isinstance(kind, tuple):
            target.add_argument(option, choices=kind, help=text)
        else:
            _complete(target.add_argument(option, help=text), kind)


def _copy(source: argparse.ArgumentParser, target: argparse.ArgumentParser) -> None:
    """Give `target` the arguments that the command's own parser has; names ending in DIR, RUN or FILE are paths."""
    for action in source._actions:
        if isinstance(action, argparse._HelpAction):
            continue
        target._add_action(action)
        words = str(action.metavar or action.dest).upper()
        if any(word in words for word in ("RUN", "DIR", "FOLDER")):
            _complete(action, "folder")
        elif any(word in words for word in ("FILE", "PATH", "INPUT", "OUTPUT")):
            _complete(action, "file")


def _complete(action: argparse.Action, kind: str | None) -> None:
    import shtab

    files: dict[str, Any] = {"file": shtab.FILE, "folder": shtab.DIRECTORY}
    if kind is not None:
        action.complete = files[kind]  # type: ignore[attr-defined]
