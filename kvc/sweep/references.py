"""References of a grid file: `{run_dir}`, `{STAGE.run_dir}` and `{STAGE.run_dirs}`."""

import re
from dataclasses import dataclass
from pathlib import Path

from kvc.errors import UserError

PATTERN = re.compile(r"\{(?:([\w-]+)\.)?(run_dirs?)\}")


@dataclass(frozen=True)
class Folders:
    """What the references of one cell stand for.

    Attributes:
        where: Grid file and cell, for complaints.
        own: The cell's own folder.
        needed: Folders of the cells that it needs, by stage.
    """

    where: str
    own: Path
    needed: dict[str, list[Path]]


def names_in(text: str) -> list[str]:
    """Stages that a text refers to."""
    return [match[1] for match in PATTERN.finditer(text) if match[1]]


def substitute(text: str, folders: Folders, one: bool = False) -> list[str]:
    """Replace the references of a text by folders.

    Args:
        text: A value or a word.
        folders: What they stand for.
        one: Whether the place takes a single word.

    Returns:
        One word, or with `{STAGE.run_dirs}` one for each folder.

    Raises:
        UserError: If a reference to one folder meets several, or several do not fit.
    """
    words = [text]
    for match in PATTERN.finditer(text):
        stage, kind = match[1], match[2]
        paths = folders.needed[stage] if stage else [folders.own]
        if kind == "run_dir" and len(paths) > 1:
            raise UserError(
                f"{folders.where}: {match[0]} is one of {len(paths)} runs: write {{{stage}.run_dirs}} for all, "
                f"or each: {stage} for a cell of its own for each"
            )
        if kind == "run_dirs" and one and len(paths) > 1:
            raise UserError(f"{folders.where}: {match[0]} stands for {len(paths)} folders where one word is expected")
        words = [word.replace(match[0], str(path)) for word in words for path in paths]
    return words
