"""Entry point: finds the command and imports nothing that it does not need."""

import importlib
import sys

TRAINER_COMMANDS = {
    "fit": "train a method, then evaluate its best checkpoint",
    "validate": "evaluate on the validation split",
    "test": "evaluate on the test split",
    "predict": "write predictions without scoring them",
}
COMMANDS = {
    "sweep": "run a grid of cells on GPU or CPU slots, or under SLURM",
    "compare": "finished runs side by side: tables, CSV, JSON, a page, plots, TensorBoard",
    "annotate": "mark reasoning traces with <COMP>, or analyse marked ones",
    "study": "read documents once, and keep the compressed memory of them",
    "ask": "answer questions from a studied memory, and from the baselines beside it",
    "score": "grade the samples of ask: pass@k, mean and majority of every arm, plots over settings",
    "ablations": "finished context compressors in the files of the SQuAD experiments, with a summary",
    "cluster": "group questions by what they ask, and find the nearest neighbours of one",
    "export": "write a trained method as a PEFT / safetensors folder or to the Hub",
    "completion": "print a shell completion script",
}

EPILOG = """\
examples:
  python -m kvc fit --config configs/comp/tiny.yaml --name first
  python -m kvc fit --config configs/comp/tiny.yaml --name second --model.optim.lr 1e-3
  python -m kvc test --run runs/first
  python -m kvc sweep experiments/sweep_tiny.yaml --slots cpu:2
  python -m kvc compare runs/first runs/second --html report.html
  python -m kvc COMMAND --help
"""


def help_text() -> str:
    """What `python -m kvc --help` prints."""
    lines = [
        "usage: python -m kvc COMMAND [options]",
        "",
        "Train, run and compare context and KV-cache compression.",
        "",
    ]
    for title, commands in (("with a Trainer", TRAINER_COMMANDS), ("without", COMMANDS)):
        lines.append(f"commands {title}:")
        lines += [f"  {name:<12}{text}" for name, text in commands.items()]
        lines.append("")
    return "\n".join(lines) + "\n" + EPILOG


def main(argv: list[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: Arguments after the program's name; `sys.argv[1:]` if None.

    Returns:
        Exit code: 0 done, 1 a bug or a failed run, 2 bad input, 130 interrupted.
    """
    from kvc.errors import UserError

    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in {"-h", "--help", "help"}:
        print(help_text(), end="")
        return 0
    if argv[0] in {"-V", "--version"}:
        from kvc import __version__

        print(f"kvc {__version__}")
        return 0
    name = argv[0]
    try:
        if name in TRAINER_COMMANDS:
            return int(importlib.import_module("kvc.cli").main(argv))
        if name in COMMANDS:
            return int(importlib.import_module(f"kvc.commands.{name}").main(argv[1:]))
        raise UserError(f"there is no command '{name}'; python -m kvc --help lists them")
    except UserError as error:
        print(f"kvc: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except KeyboardInterrupt:
        print("kvc: interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
