"""From stages to cells: the product of the axes, who needs whom, one folder and one command line each."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

from kvc.errors import UserError
from kvc.sweep.axes import Choice, labels_of, text_of
from kvc.sweep.grid import Grid, Point, Stage
from kvc.sweep.plan import Plan, Planner
from kvc.sweep.references import Folders, names_in, substitute

Settings = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """One command of a sweep.

    Attributes:
        name: Unique in the sweep; also the path of its folder below that of the sweep.
        stage: Its stage.
        argv: Words after `python -m kvc`.
        folder: Where it writes: run folder, evaluation folder, or a folder that the grid file refers to.
        needs: Names of the cells that must be done before.
        slots: Slots that it takes.
        plan: What its command line would do.
    """

    name: str
    stage: str
    argv: tuple[str, ...]
    folder: Path
    needs: tuple[str, ...] = ()
    slots: int = 1
    plan: Plan = field(default_factory=Plan)


@dataclass(frozen=True)
class _Draft:
    """A cell whose references are not resolved: its label, its values, and by stage the cells that it belongs to."""

    label: str
    point: Point
    own: tuple[str, Point]
    parent: "Cell | None" = None


def make_cells(grid: Grid, root: Path, trainer: Collection[str]) -> list[Cell]:
    """All cells of a grid, each after those that it needs.

    Args:
        grid: The grid.
        root: Folder of the sweep.
        trainer: Commands that write run folders.

    Raises:
        UserError: If stages need each other in a circle, a reference leads nowhere, or two cells have one name.
    """
    cells: list[Cell] = []
    points: dict[str, Point] = {}
    for stage in in_order(grid):
        for draft in _drafts(grid, stage, cells, points):
            name = "/".join(part for part in (stage.name, draft.label) if part) or grid.name
            if name in points:
                raise UserError(f"{grid.path}: two cells are called '{name}': give the values of their axes names")
            folders = _needed(grid, stage, draft, name, cells, points)
            points[name] = draft.point
            cells.append(_cell(grid, stage, draft, name, root, trainer, folders))
    if not cells:
        raise UserError(f"{grid.path}: no cell is left")
    return cells


def plan_cells(grid: Grid, cells: list[Cell], planner: Planner) -> list[Cell]:
    """The cells with what their own commands say that they would do.

    Raises:
        UserError: If a command line is wrong, or two cells write one folder.
    """
    configs: dict[Path, Settings] = {}
    owners: dict[Path, str] = {}
    result = []
    for cell in cells:
        try:
            plan = planner(list(cell.argv), configs)
        except UserError as error:
            raise UserError(f"{grid.path}: cell {cell.name}: {error}") from error
        folder = plan.folder or cell.folder
        other = owners.setdefault(folder.resolve(), cell.name)
        if other != cell.name:
            raise UserError(f"{grid.path}: the cells {other} and {cell.name} both write {folder}")
        if plan.folder is not None and plan.config is not None:
            configs[folder.resolve()] = plan.config
        result.append(replace(cell, plan=plan, folder=folder))
    return result


def in_order(grid: Grid) -> list[Stage]:
    """Stages, each after those that it needs.

    Raises:
        UserError: If they need each other in a circle.
    """
    left = {stage.name: stage for stage in grid.stages}
    ordered: list[Stage] = []
    while left:
        ready = [stage for stage in left.values() if not set(needs_of(grid, stage)) & left.keys()]
        if not ready:
            circle = _circle({name: needs_of(grid, stage) for name, stage in left.items()})
            raise UserError(f"{grid.path}: needs: the stages need each other in a circle: {' -> '.join(circle)}")
        for stage in ready:
            ordered.append(left.pop(stage.name))
    return ordered


def needs_of(grid: Grid, stage: Stage) -> list[str]:
    """Stages that come before this one: named in `needs` or `each`, or referred to.

    Raises:
        UserError: If a reference names no stage.
    """
    values: list[Any] = [*stage.settings.values(), *stage.args]
    values += [value for axis in stage.axes for choice in axis.choices for value in choice.settings.values()]
    values += [value for _, point in stage.include for choice in point.values() for value in choice.settings.values()]
    needs = [*stage.needs, *([stage.each] if stage.each else [])]
    for name in (name for value in values for name in names_in(text_of(value))):
        if name not in {other.name for other in grid.stages}:
            raise UserError(f"{grid.path}: stage '{stage.name}': {{{name}.run_dir}} names no stage")
        needs.append(name)
    return list(dict.fromkeys(needs))


def _circle(needs: dict[str, list[str]]) -> list[str]:
    """A walk along unmet needs, which must come back."""
    path = [next(iter(needs))]
    while path[-1] not in path[:-1]:
        path.append(next(name for name in needs[path[-1]] if name in needs))
    return path[path.index(path[-1]) :]


def _drafts(grid: Grid, stage: Stage, cells: list[Cell], points: dict[str, Point]) -> Iterator[_Draft]:
    """Every cell of a stage: the points of its axes, for each cell of the stage that it follows."""
    parents: list[Cell | None] = [cell for cell in cells if cell.stage == stage.each] if stage.each else [None]
    for parent in parents:
        inherited = points[parent.name] if parent is not None else {}
        prefix = parent.name.removeprefix(f"{parent.stage}/") if parent is not None else ""
        if parent is not None and prefix == parent.stage:
            prefix = ""
        for label, point in _points(grid, stage):
            if both := sorted(inherited.keys() & point.keys()):
                raise UserError(
                    f"{grid.path}: stage '{stage.name}' has {', '.join(both)} from stage '{stage.each}' already"
                )
            joined = ",".join(part for part in (prefix, label) if part)
            yield _Draft(joined, {**inherited, **point}, (label, point), parent)


def _points(grid: Grid, stage: Stage) -> Iterator[tuple[str, Point]]:
    """Label and values of each cell on the stage's own axes."""
    labels = labels_of(axis.key for axis in stage.axes)
    for point in _product(grid, stage):
        yield ",".join(f"{labels[key]}={choice.name}" for key, choice in point.items()), point
    for name, point in stage.include:
        own = labels_of(point)
        yield name or ",".join(f"{own[key]}={choice.name}" for key, choice in point.items()), point


def _product(grid: Grid, stage: Stage) -> list[Point]:
    """The product of the axes: what is not excluded and meets every condition, or as many of it as are drawn."""
    used = [False] * len(stage.exclude)
    choices = [[(axis.key, choice) for choice in axis.choices] for axis in stage.axes]
    points = []
    # Without axes, cells that are listed are all there are.
    for chosen in product(*choices) if choices or not stage.include else ():
        point = dict(chosen)
        hits = [all(point[key].name in names for key, names in rule.items()) for rule in stage.exclude]
        used = [before or hit for before, hit in zip(used, hits)]
        if not any(hits):
            points.append(point)
    if not all(used):
        raise UserError(f"{grid.path}: stage '{stage.name}': exclude: rule {used.index(False) + 1} meets no cell")
    try:
        points = [point for point in points if all(condition.holds(_set(stage, point)) for condition in stage.require)]
    except ValueError as error:
        raise UserError(f"{grid.path}: stage '{stage.name}': require: {error}") from error
    try:
        return stage.random.of(points) if stage.random else points
    except ValueError as error:
        raise UserError(f"{grid.path}: stage '{stage.name}': random.count: {error}") from error


def _set(stage: Stage, point: Point) -> Settings:
    """Settings of the stage, then those of the values on its axes."""
    settings = dict(stage.settings)
    for choice in point.values():
        settings |= choice.settings
    return settings


def _needed(
    grid: Grid, stage: Stage, draft: _Draft, name: str, cells: list[Cell], points: dict[str, Point]
) -> dict[str, list[Cell]]:
    """By needed stage, the cells with the same values on the axes that both have."""
    needed = {}
    for other in needs_of(grid, stage):
        if other == stage.each:
            assert draft.parent is not None
            needed[other] = [draft.parent]
            continue
        needed[other] = [cell for cell in cells if cell.stage == other and _agree(points[cell.name], draft.point)]
        if not needed[other]:
            raise UserError(f"{grid.path}: cell {name} needs a cell of stage '{other}' with its values: there is none")
    return needed


def _agree(one: Point, other: Point) -> bool:
    return all(one[key] == other[key] or one[key].name == other[key].name for key in one.keys() & other.keys())


def _cell(
    grid: Grid,
    stage: Stage,
    draft: _Draft,
    name: str,
    root: Path,
    trainer: Collection[str],
    needed: dict[str, list[Cell]],
) -> Cell:
    """Settings in order of precedence, references resolved, as a command line."""
    label, point = draft.own
    choices: list[Choice] = list(point.values())
    settings = _set(stage, point)
    folders = Folders(f"{grid.path}: cell {name}", root / name, {s: [c.folder for c in cs] for s, cs in needed.items()})
    words: list[str] = [stage.command]
    folder = root / name
    if stage.command in trainer:
        for config in (*stage.base, *(config for choice in choices for config in choice.configs)):
            words += ["--config", config]
        resolved = {key: substitute(text_of(value), folders, one=True)[0] for key, value in settings.items()}
        if "run" in resolved and stage.command != "fit":
            shown = draft.label if stage.each is None else label
            resolved.setdefault("eval_name", ",".join(part for part in (stage.name, shown) if part) or grid.name)
            folder = Path(resolved["run"]) / "eval" / resolved["eval_name"]
        else:
            resolved["run_dir"] = str(folder)
        for key, text in resolved.items():
            words += [f"--{key}", text]
    else:
        words += _options(settings, folders)
        if stage.args and isinstance(next(reversed(settings.values()), None), list):
            # Else the option would take the positional words for more of its values.
            words.append("--")
        words += [word for text in stage.args for word in substitute(text, folders)]
    ids = [cell.name for group in needed.values() for cell in group]
    return Cell(name, stage.name, tuple(words), folder, tuple(dict.fromkeys(ids)), stage.gpus)


def _options(settings: Settings, folders: Folders) -> list[str]:
    """Options in the way of argparse: true is a bare flag, false and null are left out, a list is several words."""
    words: list[str] = []
    for key, value in settings.items():
        if value is False or value is None:
            continue
        words.append(f"--{key}")
        if value is not True:
            values = value if isinstance(value, list) else [value]
            words += [word for item in values for word in substitute(text_of(item), folders)]
    return words
