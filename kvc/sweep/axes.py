"""The parts of a grid that vary: axes, their values and the readable names that cells get from them."""

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvc.errors import UserError

SUFFIXES = (".yaml", ".yml")
SEED_AXIS = "seed"
CONFIG_AXIS = "config"
CHOICE_KEYS = ("name", "set", "base")
LONGEST = 40


@dataclass(frozen=True)
class Choice:
    """One value of an axis.

    Attributes:
        name: What cells are called by.
        settings: Dotted keys and values that it sets.
        configs: Configuration files that it adds.
    """

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    configs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Axis:
    """A key of the grid and the values that it takes."""

    key: str
    choices: tuple[Choice, ...]

    def find(self, name: str) -> Choice | None:
        """The value called `name`."""
        return next((choice for choice in self.choices if choice.name == name), None)


def name_of(value: Any) -> str:
    """A part of a folder name that stands for a value: `0.001`, `true`, `llama-13b` for a file, `2-4` for a list."""
    if isinstance(value, list):
        value = "-".join(name_of(item) for item in value)
    if isinstance(value, str) and value.endswith(SUFFIXES):
        value = Path(value).stem
    text = re.sub(r"[^\w.+=,-]+", "-", text_of(value)).strip("-.")
    return text[:LONGEST] or "empty"


def text_of(value: Any) -> str:
    """A value as a word of the command line."""
    import json

    if isinstance(value, str):
        return value
    return json.dumps(value)


def labels_of(keys: Iterable[str]) -> dict[str, str]:
    """The shortest end of each dotted key that no other key shares."""
    parts = {key: [part for part in key.split(".") if part != "init_args"] or [key] for key in keys}
    labels = {}
    for key, own in parts.items():
        others = [other for name, other in parts.items() if name != key]
        lengths = range(1, len(own) + 1)
        length = next((n for n in lengths if all(other[-n:] != own[-n:] for other in others)), len(own))
        labels[key] = ".".join(own[-length:])
    return labels


def seed_choice(key: str, seed: int) -> Choice:
    """A seed as the value of an axis."""
    return Choice(str(seed), {key: seed})


class Reader:
    """Checks parts of a grid file and says in one sentence what is wrong where.

    Args:
        path: The grid file; files that it names are relative to it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def check(self, fine: bool, where: str, complaint: str) -> None:
        """Raise `UserError` unless `fine`."""
        if not fine:
            raise UserError(f"{self.path}: {where}: {complaint}" if where else f"{self.path}: {complaint}")

    def strings(self, value: Any, where: str) -> tuple[str, ...]:
        """One string or a list of them."""
        values = [value] if isinstance(value, str) else value
        fine = isinstance(values, list) and all(isinstance(item, str) for item in values)
        self.check(fine, where, f"expected text or a list of texts, got {value!r}")
        return tuple(values)

    def files(self, value: Any, where: str) -> tuple[str, ...]:
        """Configuration files, which must exist."""
        return tuple(self.file(item, where) for item in self.strings(value, where))

    def file(self, name: str, where: str) -> str:
        """A file beside the grid file, as a path from the current folder where that is shorter."""
        path = self.path.parent / name
        self.check(path.is_file(), where, f"there is no file {path}")
        near = os.path.relpath(path)
        return str(path.resolve()) if near.startswith("..") else near

    def settings(self, value: Any, where: str) -> dict[str, Any]:
        """Dotted keys and values; a value that ends in .yaml is a file."""
        fine = isinstance(value, dict) and all(isinstance(key, str) for key in value)
        self.check(fine, where, f"expected dotted keys and values, got {value!r}")
        return {key: self._value(item, f"{where}.{key}") for key, item in value.items()}

    def _value(self, value: Any, where: str) -> Any:
        if isinstance(value, str) and value.endswith(SUFFIXES) and "{" not in value:
            return self.file(value, where)
        return value

    def axes(self, value: Any, where: str) -> tuple[Axis, ...]:
        """Axes by key, each with at least one value, no two of one name."""
        self.check(isinstance(value, dict), where, f"expected lists of values by dotted key, got {value!r}")
        axes = []
        for key, values in value.items():
            at = f"{where}.{key}"
            self.check(isinstance(key, str), at, "expected a dotted key")
            self.check(key != SEED_AXIS, at, "use seeds: [...] for seeds")
            self.check(isinstance(values, list) and bool(values), at, "expected a list of at least one value")
            choices = [self.choice(key, item, at) for item in values]
            names = [choice.name for choice in choices]
            for name in names:
                twins = (
                    f"two values are called '{name}', so two cells would have one name; write {{name: ..., set: ...}}"
                )
                self.check(names.count(name) == 1, at, twins)
            axes.append(Axis(key, tuple(choices)))
        return tuple(axes)

    def choice(self, key: str, value: Any, where: str) -> Choice:
        """One value of an axis: plain, a file, or `{name: ..., set: {...}, base: ...}`."""
        if isinstance(value, dict):
            for name in value:
                self.check(name in CHOICE_KEYS, f"{where}.{name}", f"unknown key; a value has {', '.join(CHOICE_KEYS)}")
            self.check("name" in value, where, "a value that sets several keys needs a name")
            settings = self.settings(value.get("set", {}), f"{where}.set")
            return Choice(name_of(value["name"]), settings, self.files(value.get("base", []), f"{where}.base"))
        if key == CONFIG_AXIS:
            self.check(isinstance(value, str), where, f"expected a configuration file, got {value!r}")
            return Choice(name_of(value), configs=(self.file(value, where),))
        return Choice(name_of(value), {key: self._value(value, where)})

    def include(
        self, value: Any, where: str, axes: tuple[Axis, ...], seed_key: str
    ) -> tuple[tuple[str, dict[str, Choice]], ...]:
        """Cells beside the product: values by axis or by any dotted key, and an optional name."""
        by_key = {axis.key: axis for axis in axes}
        points = []
        for entry in self._entries(value, where):
            point: dict[str, Choice] = {}
            if "set" in entry or "base" in entry:
                point[""] = self.choice("", {key: entry[key] for key in CHOICE_KEYS if key in entry}, where)
            for key, item in entry.items():
                if key in CHOICE_KEYS:
                    continue
                axis = by_key.get(key)
                known = axis.find(name_of(item)) if axis is not None and not isinstance(item, dict) else None
                if key == SEED_AXIS:
                    self.check(type(item) is int, f"{where}.seed", f"expected a number, got {item!r}")
                    known = seed_choice(seed_key, item)
                point[key] = known or self.choice(key, item, f"{where}.{key}")
            points.append((name_of(entry["name"]) if "name" in entry else "", point))
        return tuple(points)

    def exclude(self, value: Any, where: str, axes: tuple[Axis, ...]) -> tuple[dict[str, frozenset[str]], ...]:
        """Combinations to leave out: values, or lists of them, by axis."""
        by_key = {axis.key: axis for axis in axes}
        rules = []
        for entry in self._entries(value, where):
            rule = {}
            for key, items in entry.items():
                self.check(key in by_key, f"{where}.{key}", f"no axis; there are {', '.join(by_key) or 'none'}")
                names = [name_of(item) for item in (items if isinstance(items, list) else [items])]
                for name in names:
                    self.check(by_key[key].find(name) is not None, f"{where}.{key}", f"the axis has no value {name}")
                rule[key] = frozenset(names)
            rules.append(rule)
        return tuple(rules)

    def _entries(self, value: Any, where: str) -> list[dict[str, Any]]:
        fine = isinstance(value, list) and all(isinstance(entry, dict) and entry for entry in value)
        self.check(fine, where, "expected a list of mappings")
        return list(value)
