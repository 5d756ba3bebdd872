"""Parses a command line with the command's own parser and runs nothing: how a sweep checks its cells."""

import importlib
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

from kvc.__main__ import COMMANDS, TRAINER_COMMANDS
from kvc.cli import Cli, import_parts, quiet
from kvc.errors import UserError
from kvc.runs import RunFolder
from kvc.sweep.plan import Plan

REPLACE = ("--overwrite", "--recompute")
"""Options by which commands replace what is there."""


class PlannedCli(Cli):
    """The CLI up to the point where it would claim the run folder.

    Args:
        argv: Command and options.
        planned: Configurations by resolved run folder, for runs that do not exist yet.
    """

    def __init__(self, argv: list[str], planned: Mapping[Path, dict[str, Any]]) -> None:
        self.planned = planned
        super().__init__(argv)

    def read_trained(self, run: RunFolder) -> dict[str, Any]:
        """The configuration that the run will have, else the one that it has."""
        config = self.planned.get(run.path.resolve())
        return run.read_config() if config is None else deepcopy(config)

    def _set_seed(self) -> None:
        """Nothing is drawn."""

    def before_instantiate_classes(self) -> None:
        """Find out folder and configuration."""
        self.identify()

    def instantiate_classes(self) -> None:
        """Build nothing."""

    def after_instantiate_classes(self) -> None:
        """Nothing was built."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Run nothing."""


def plan(argv: list[str], planned: Mapping[Path, dict[str, Any]]) -> Plan:
    """What a command line would do.

    Args:
        argv: Command and options.
        planned: Configurations by resolved run folder, for runs that do not exist yet.

    Raises:
        UserError: What the command itself would say.
    """
    name = argv[0]
    if name in TRAINER_COMMANDS:
        quiet()
        import_parts()
        cli = PlannedCli(argv, planned)
        trained = cli.trained.path if cli.trained is not None else None
        return Plan(cli.folder.path, cli.run_config, trained, ("--overwrite", "true"))
    if name not in COMMANDS:
        raise UserError(f"there is no command '{name}'")
    module = importlib.import_module(f"kvc.commands.{name}")
    if not hasattr(module, "parser"):
        return Plan()
    parser = module.parser()
    try:
        parser.parse_args(argv[1:])
    except SystemExit:
        raise UserError(f"'{' '.join(argv)}' only prints its help") from None
    known = {option for action in parser._actions for option in action.option_strings}
    return Plan(overwrite=tuple(option for option in REPLACE if option in known)[:1])
