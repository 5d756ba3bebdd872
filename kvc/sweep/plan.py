"""What a command line would do: the answer of the command's own parser, which the sweep gets handed in."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True)
class Plan:
    """What a parsed, but not yet run, command line would do.

    Attributes:
        folder: Run or evaluation folder that it writes; None for a command without run folders.
        config: Its full configuration, without the digest of a trained checkpoint.
        trained: The run that it evaluates.
        overwrite: Words that make it replace what is there; empty if it knows none.
    """

    folder: Path | None = None
    config: dict[str, Any] | None = None
    trained: Path | None = None
    overwrite: tuple[str, ...] = ()


class Planner(Protocol):
    """Parses a command line without running it."""

    def __call__(self, argv: list[str], planned: Mapping[Path, dict[str, Any]]) -> Plan:
        """Parse `argv`; `planned` holds configurations of run folders that do not exist yet.

        Raises:
            UserError: What the command itself would say.
        """
