"""The parser behind `fit`, `validate`, `test` and `predict`: what it says in its help, and how it complains."""

from typing import NoReturn

import jsonargparse
from lightning.pytorch.cli import LightningArgumentParser

from kvc.errors import UserError
from kvc.messages import one_sentence

DESCRIPTIONS = {
    "fit": "Train a method, then evaluate its best checkpoint. The same folder goes on where it stopped.",
    "validate": "Evaluate on the validation split, into RUN/eval/validate.",
    "test": "Evaluate on the test split, into RUN/eval/test.",
    "predict": "Write predictions for the test split without scoring them, into RUN/eval/predict.",
}
USAGES = {
    "fit": "python -m kvc fit --config FILE (--name NAME | --run_dir FOLDER) [--KEY VALUE ...]",
    **{
        command: f"python -m kvc {command} (--run RUN | --config FILE --name NAME) [--KEY VALUE ...]"
        for command in ("validate", "test", "predict")
    },
}
EXAMPLES = {
    "fit": """examples:
  python -m kvc fit --config configs/comp/tiny.yaml --name first
  python -m kvc fit --config configs/comp/tiny.yaml --run_dir /data/run1 --model.optim.lr 1e-3
  python -m kvc fit --config configs/comp/llama31_8b.yaml --trainer configs/trainer/ddp4_bf16.yaml --name 8b
  python -m kvc fit --model.help kvc.methods.comp.CompClassifier    (what a method takes)""",
    "validate": """examples:
  python -m kvc validate --run runs/first""",
    "test": """examples:
  python -m kvc test --run runs/first                     (the run's own data)
  python -m kvc test --run runs/first --config other_data.yaml --eval_name other
  python -m kvc test --config configs/lm/report.yaml --name report   (an Evaluation: nothing is trained)""",
    "predict": """examples:
  python -m kvc predict --run runs/first --data.init_args.path traces.jsonl""",
}


class Parser(LightningArgumentParser):
    """Parser whose errors are one sentence."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise `UserError` with the heart of jsonargparse's message."""
        commands = self._subcommands_action
        parsers = [self, *(commands._name_parser_map.values() if commands else [])]
        known = {action.dest for parser in parsers for action in parser._actions if "help" not in action.dest}
        raise UserError(one_sentence(message, sorted(known))) from ex


class Formatter(jsonargparse.DefaultHelpFormatter):
    """Keeps the line breaks of the examples."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "".join(indent + line for line in text.splitlines(keepends=True))
