"""Names of runs of context compressors, from their configurations."""

import importlib
import inspect
import json
from pathlib import Path
from typing import Any

import yaml

from kvc.errors import UserError
from kvc.methods.squad.baselines import CONTROLS, METHOD, PLAIN, SIZED
from kvc.methods.squad.baselines import label as budget_label
from kvc.methods.squad.source import EMBEDDINGS, LAST, Source

BASELINES = "baselines"
FULL, NOTHING = "full text, tuned", "no context, tuned"
TUNED = dict(zip(CONTROLS.values(), (FULL, NOTHING)))
UNTUNED = dict(zip(PLAIN, ("full text, base model", "no context, base model")))
PARTS = dict(zip(SIZED, ("first tokens", "last tokens", "random tokens", "untrained means of embeddings")))
DISTILLED = {"Kd", "TeacherForcing"}


def label(folder: Path) -> str:
    """Name of what a run trained: a control, `BASELINES`, or `LINE, BUDGET`; what is left at its default is not named.

    Raises:
        UserError: If it is no run of `ContextCompressor` or `TextBaselines`.
    """
    model = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))["model"]
    settings, kind = model.get("init_args") or {}, model["class_path"].rsplit(".", 1)[1]
    if kind == "TextBaselines":
        return BASELINES
    if kind != "ContextCompressor":
        raise UserError(f"{folder}: a run of {kind}, which this table does not know")
    if settings["mode"] in CONTROLS:
        return TUNED[CONTROLS[settings["mode"]]]
    compressor = settings["compressor"] or {"class_path": "kvc.methods.squad.MeanPool"}
    name = _written(compressor, left_out=("slots", "max_length"))
    if name.split("(")[0] != "Anchors":
        name += f" of {_source(settings['source'] or {})}"
    return f"{name}{_more(settings)}, {_budget(settings['budget'])}"


def split(name: str) -> tuple[str, str | None]:
    """Line and budget of an arm; an arm without a budget is a line of its own."""
    if name in {*TUNED.values(), *UNTUNED.values()}:
        return name, None
    line, budget = name.rsplit(", ", 1)
    return line, budget


def own(name: str, arm: str, measured: set[str]) -> str | None:
    """The name under which the table keeps an arm of a run.

    Args:
        name: The run's label.
        arm: Its arm.
        measured: Labels of all runs: what another run says of a control counts only where the control is none of them.
    """
    if arm == METHOD:
        return None if name == BASELINES else name
    if arm in TUNED:
        return None if TUNED[arm] in measured else TUNED[arm]
    if arm in UNTUNED:
        return UNTUNED[arm]
    kind, *budget = arm.split()
    return f"{PARTS[kind]}, {budget[0] if budget else split(name)[1]}"


def _source(settings: dict[str, Any]) -> str:
    source = Source(**settings)
    if source.states == EMBEDDINGS:
        return "embeddings"
    name = "frozen states" if source.frozen else "adapted states"
    name += "" if source.states == LAST else f" of layer {source.states.split(':')[1]}"
    name = name if source.bidirectional else f"{name} read causally"
    return f"{name} and embeddings" if source.residual else name


def _budget(settings: dict[str, Any] | None) -> str:
    settings = settings or {"class_path": "kvc.methods.squad.FixedRatio"}
    made = _class(settings["class_path"])(**(settings.get("init_args") or {}))
    return budget_label(made).replace(", ", ",")


def _more(settings: dict[str, Any]) -> str:
    """Whatever else differs between the runs of a grid."""
    found = []
    terms = [_written(term) for term in settings["losses"] or []]
    if not terms or set(terms) == DISTILLED:
        found.append("distilled")
    elif terms != ["TeacherForcing"]:
        found.append("loss " + " + ".join(terms))
    if settings.get("positions", "compact") != "compact":
        found.append(f"{settings['positions']} positions")
    if settings.get("frozen_decoder"):
        found.append("frozen decoder")
    if settings.get("teacher"):
        found.append("another teacher")
    if settings.get("train_budget"):
        found.append(f"trained with {_written(settings['train_budget'])}")
    return "".join(f", {part}" for part in found)


def _written(settings: dict[str, Any], left_out: tuple[str, ...] = ()) -> str:
    """Class and settings that are not its defaults: `CrossAttention(query_init=tokens)`."""
    path, given = settings["class_path"], settings.get("init_args") or {}
    known = inspect.signature(_class(path)).parameters
    changed = {key: value for key, value in given.items() if key not in left_out and value != known[key].default}
    name: str = path.rsplit(".", 1)[1]
    return name + (f"({', '.join(f'{key}={_value(value)}' for key, value in changed.items())})" if changed else "")


def _value(value: Any) -> str:
    if isinstance(value, dict) and "class_path" in value:
        return _written(value)
    if isinstance(value, list):
        return f"[{', '.join(map(_value, value))}]"
    return value if isinstance(value, str) else json.dumps(value)


def _class(path: str) -> Any:
    module, name = path.rsplit(".", 1)
    return getattr(importlib.import_module(module), name)
