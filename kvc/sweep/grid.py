"""The grid file: stages with base configurations, axes, seeds and needs, checked key by key."""

from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from kvc.errors import UserError
from kvc.runs import read_yaml
from kvc.sweep.axes import SEED_AXIS, Axis, Choice, Reader, seed_choice
from kvc.sweep.conditions import Condition, parse_condition
from kvc.sweep.draws import Draw

Point = dict[str, Choice]
"""What one cell has on each axis, by the axis' key."""

STAGE_KEYS = (
    *("command", "base", "set", "args", "axes", "include", "exclude", "require", "random", "seeds", "needs", "each"),
    *("verify", "gpus_per_cell"),
)
DRAW_KEYS = ("count", "seed")
RESERVED = ("run_dir", "name", "overwrite", "config")


@dataclass(frozen=True)
class Stage:
    """Cells that run one command.

    Attributes:
        name: Name in the grid file; empty for a grid without `stages`.
        command: Command of `python -m kvc`.
        base: Configuration files, in the order in which they are merged.
        settings: Dotted keys and values of every cell.
        args: Positional words of a command without a Trainer.
        axes: What varies; the seeds come last.
        include: Cells beside the product of the axes, with their names if they are given.
        exclude: Names of values by axis; a cell that has them all is left out.
        require: What the settings of a cell of the product must meet; others are left out.
        random: How many of the product are drawn; all if None.
        needs: Stages that come first.
        each: The stage whose every cell gets cells of this one.
        verify: Whether it only checks what others have made, so that it can be left out.
        gpus: Slots that one cell takes.
    """

    name: str
    command: str
    base: tuple[str, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    args: tuple[str, ...] = ()
    axes: tuple[Axis, ...] = ()
    include: tuple[tuple[str, Point], ...] = ()
    exclude: tuple[dict[str, frozenset[str]], ...] = ()
    require: tuple[Condition, ...] = ()
    random: Draw | None = None
    needs: tuple[str, ...] = ()
    each: str | None = None
    verify: bool = False
    gpus: int = 1


@dataclass(frozen=True)
class Grid:
    """A grid file.

    Attributes:
        path: The file.
        name: Name of the sweep: its runs lie in `runs/NAME`.
        stages: In the order of the file.
    """

    path: Path
    name: str
    stages: tuple[Stage, ...]


def read_grid(path: Path, trainer: Collection[str], commands: Collection[str]) -> Grid:
    """Read and check a grid file.

    Args:
        path: YAML file.
        trainer: Commands that write run folders.
        commands: The other commands that a cell may run.

    Raises:
        UserError: If it cannot be read or has an unknown key, an empty axis or a value of the wrong kind.
    """
    if not path.is_file():
        raise UserError(f"there is no grid file {path}")
    content = read_yaml(path)
    _refuse_twins(path)
    known = ("name", "stages") if "stages" in content else ("name", *STAGE_KEYS)
    reader = Reader(path)
    for key in content:
        reader.check(key in known, str(key), f"unknown key; a grid has {', '.join(known)}")
    name = content.get("name", path.stem)
    reader.check(_is_name(name), "name", f"expected the name of a folder, got {name!r}")
    parts = {"": {key: value for key, value in content.items() if key != "name"}}
    if "stages" in content:
        parts = content["stages"]
        reader.check(isinstance(parts, dict) and bool(parts), "stages", "expected stages by name")
    stages = tuple(_stage(reader, stage, part, trainer, commands) for stage, part in parts.items())
    names = [stage.name for stage in stages]
    for stage in stages:
        for other in (*stage.needs, *([stage.each] if stage.each else [])):
            where = f"stages.{stage.name}.needs" if stage.name else "needs"
            reader.check(other in names, where, f"there is no stage '{other}'")
    return Grid(path, name, stages)


def _stage(reader: Reader, name: str, part: Any, trainer: Collection[str], commands: Collection[str]) -> Stage:
    where = f"stages.{name}" if name else ""
    reader.check(not name or _is_name(name), where, "a stage's name is that of a folder: letters, digits, - and _")
    reader.check(isinstance(part, dict), where, "expected a mapping of settings")
    at = f"{where}." if where else ""
    for key in part:
        reader.check(key in STAGE_KEYS, f"{at}{key}", f"unknown key; a stage has {', '.join(STAGE_KEYS)}")
    command = part.get("command", "fit")
    known = [*trainer, *commands]
    reader.check(command in known, f"{at}command", f"there is no command '{command}' to sweep, only {', '.join(known)}")
    settings = reader.settings(part.get("set", {}), f"{at}set")
    for key in RESERVED if command in trainer else ():
        reader.check(key not in settings, f"{at}set.{key}", "is set by the sweep")
    args = reader.strings(part.get("args", []), f"{at}args")
    reader.check(not args or command not in trainer, f"{at}args", f"{command} takes no positional arguments")
    gpus = part.get("gpus_per_cell", 1)
    reader.check(type(gpus) is int and gpus >= 1, f"{at}gpus_per_cell", f"expected a number from 1, got {gpus!r}")
    each = part.get("each")
    reader.check(each is None or isinstance(each, str), f"{at}each", "expected the name of a stage")
    verify = part.get("verify", False)
    reader.check(isinstance(verify, bool), f"{at}verify", f"expected true or false, got {verify!r}")
    axes = reader.axes(part.get("axes", {}), f"{at}axes")
    seed_key = "seed_everything" if command in trainer else "seed"
    if "seeds" in part:
        seeds = part["seeds"]
        fine = isinstance(seeds, list) and bool(seeds) and all(type(seed) is int for seed in seeds)
        reader.check(fine, f"{at}seeds", "expected a list of numbers")
        axes = (*axes, Axis(SEED_AXIS, tuple(seed_choice(seed_key, seed) for seed in seeds)))
    return Stage(
        name=name,
        command=command,
        base=reader.files(part.get("base", []), f"{at}base"),
        settings=settings,
        args=args,
        axes=axes,
        include=reader.include(part.get("include", []), f"{at}include", axes, seed_key),
        exclude=reader.exclude(part.get("exclude", []), f"{at}exclude", axes),
        require=_conditions(reader, part.get("require", []), f"{at}require"),
        random=_draw(reader, part["random"], f"{at}random") if "random" in part else None,
        needs=reader.strings(part.get("needs", []), f"{at}needs"),
        each=each,
        verify=verify,
        gpus=gpus,
    )


def _conditions(reader: Reader, value: Any, where: str) -> tuple[Condition, ...]:
    try:
        return tuple(parse_condition(text) for text in reader.strings(value, where))
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{reader.path}: {where}: {error}") from error


def _draw(reader: Reader, value: Any, where: str) -> Draw:
    fine = isinstance(value, dict) and sorted(value) == sorted(DRAW_KEYS)
    reader.check(fine and all(type(number) is int for number in value.values()), where, "expected {count: N, seed: N}")
    reader.check(value["count"] >= 1, f"{where}.count", f"expected a number from 1, got {value['count']}")
    return Draw(value["count"], value["seed"])


def without_verification(grid: Grid) -> Grid:
    """The grid without the stages that only check what others have made.

    Raises:
        UserError: If there are none, or nothing else.
    """
    kept = tuple(stage for stage in grid.stages if not stage.verify)
    if not kept or len(kept) == len(grid.stages):
        which = "every" if not kept else "no"
        raise UserError(f"{grid.path}: --no-verify leaves out stages with verify: true, and {which} stage has it")
    return Grid(grid.path, grid.name, kept)


def _is_name(name: Any) -> bool:
    return isinstance(name, str) and bool(name) and all(c.isalnum() or c in "-_" for c in name)


def _refuse_twins(path: Path) -> None:
    """A key that stands twice would silently lose its first value."""
    nodes = [yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)]
    while nodes:
        node = nodes.pop()
        if isinstance(node, yaml.MappingNode):
            seen: set[str] = set()
            for key, value in node.value:
                if key.value in seen and key.tag != "tag:yaml.org,2002:merge":
                    raise UserError(f"{path} line {key.start_mark.line + 1}: '{key.value}' stands twice")
                seen.add(key.value)
                nodes.append(value)
        elif isinstance(node, yaml.SequenceNode):
            nodes += node.value
