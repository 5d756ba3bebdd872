"""One configuration out of several YAML files that name each other."""

from pathlib import Path
from typing import Any

from kvc.errors import UserError
from kvc.runs import read_yaml

SUFFIXES = (".yaml", ".yml")


def compose(path: Path) -> dict[str, Any]:
    """Read a configuration and put the files that it names in their places.

    A value that ends in `.yaml` is a file, relative to the one that names it. A dotted key such as `trainer.max_epochs`
    sets one value. Keys work in the order in which they stand, later ones over earlier ones. jsonargparse 4.53 knows
    both forms, but of `trainer: FILE` and `trainer.KEY: VALUE` in one file it silently drops one.

    Args:
        path: A YAML file.

    Raises:
        UserError: If a file is missing or no mapping in YAML.
    """
    config: dict[str, Any] = {}
    for key, value in read_yaml(path).items():
        _place(config, str(key).split("."), _expand(value, path, str(key)))
    return config


def _expand(value: Any, path: Path, key: str) -> Any:
    if isinstance(value, dict):
        return {name: _expand(inner, path, f"{key}.{name}") for name, inner in value.items()}
    if isinstance(value, str) and value.endswith(SUFFIXES):
        part = path.parent / value
        if not part.is_file():
            raise UserError(f"{path}: {key}: there is no file {part}")
        return compose(part)
    return value


def _place(config: dict[str, Any], keys: list[str], value: Any) -> None:
    """Set a value at a path of keys; a mapping is merged into the mapping that is there."""
    for key in keys[:-1]:
        inner = config.setdefault(key, {})
        if not isinstance(inner, dict):
            inner = config[key] = {}
        config = inner
    before = config.get(keys[-1])
    if isinstance(before, dict) and isinstance(value, dict):
        for key, inner in value.items():
            _place(before, [key], inner)
    else:
        config[keys[-1]] = value
