"""Files of samples, as `python -m kvc ask` writes them: found, checked and read."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvc.errors import UserError

KIND = "ask"
RENAMED = {"max_new_tokens": "summary_tokens"}
"""Settings of a study that have another meaning when asking."""
SEED = "seed"
NOT_SETTINGS = (SEED, "schema", "model", "documents")
"""What a study notes beside its settings; documents are counted instead."""
Key = tuple[str, str]
"""Id and text of a question: what pairs arms, files and seeds."""


@dataclass(frozen=True)
class Sampled:
    """The samples of one question in one arm of one file.

    Attributes:
        key: Id and text of the question.
        gold: The right answer.
        responses: Of each sample, without the thinking.
        costs: Numbers of each sample by name, such as its new tokens.
    """

    key: Key
    gold: str
    responses: tuple[str, ...]
    costs: dict[str, tuple[float, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Samples:
    """One file.

    Attributes:
        path: The file.
        settings: How the memory was made and asked, without seeds and places.
        seeds: Seeds of the study and of the sampling.
        arms: By name, in the order of the file.
    """

    path: Path
    settings: dict[str, Any]
    seeds: tuple[Any, Any]
    arms: dict[str, list[Sampled]]


def find_files(places: Iterable[Path]) -> list[Path]:
    """The files that are named, and those below the folders that are named.

    Raises:
        UserError: If a place does not exist, or a folder has no such file.
    """
    found: dict[Path, Path] = {}
    for place in places:
        if place.is_dir():
            below = [path for path in sorted(place.rglob("*.json")) if _is_ask(path)]
            if not below:
                raise UserError(f"{place}: there is no answer file below it; kvc ask writes them with --output_file")
        elif place.is_file():
            below = [place]
        else:
            raise UserError(f"{place}: there is no such file or folder")
        found |= {path.resolve(): path for path in below}
    return list(found.values())


def read_samples(path: Path, gold: str | None = None) -> Samples:
    """Read one file.

    Args:
        path: The file.
        gold: The answer of records that have none.

    Raises:
        UserError: If it cannot be read or is no file of `kvc ask`, or a key is missing or of the wrong kind.
    """
    content = _parse(path)
    if not isinstance(content, dict) or content.get("kind") != KIND:
        raise UserError(f'{path}: not a file of kvc ask (it has no "kind": "{KIND}")')
    memory, asked = _optional(path, content, "memory"), _optional(path, content, "settings")
    study = _optional(path, memory, "study", "memory.")
    model = _optional(path, content, "model")
    settings = {"model": model.get("name"), "model_hash": model.get("hash")}
    settings |= {RENAMED.get(key, key): value for key, value in study.items() if key not in NOT_SETTINGS}
    settings |= {"documents": memory["documents"]} if "documents" in memory else {}
    settings |= {f"ask.{key}": value for key, value in asked.items() if key not in (SEED, "repeat_time")}
    arms: dict[str, list[Sampled]] = {arm: [] for arm in content.get("arms") or []}
    results = content.get("results")
    if not isinstance(results, list) or not results:
        raise UserError(f"{path}: results: expected a list of at least one entry")
    for number, entry in enumerate(results):
        where = f"{path}: results[{number}]"
        if not isinstance(entry, dict):
            raise UserError(f"{where}: expected an object, got {type(entry).__name__}")
        arms.setdefault(str(entry.get("arm", "memory")), []).append(_sampled(where, entry, gold))
    return Samples(
        path, settings, (study.get(SEED), asked.get(SEED)), {arm: items for arm, items in arms.items() if items}
    )


def _sampled(where: str, entry: dict[str, Any], gold: str | None) -> Sampled:
    answer = entry.get("answer")
    answer = gold if answer in (None, "") else answer
    if answer is None:
        raise UserError(f"{where}: has no answer to compare with; --answer GIVES one for all such records")
    generations = entry.get("all_generations")
    if not isinstance(generations, list) or not generations:
        raise UserError(f"{where}.all_generations: expected a list of at least one sample")
    responses = []
    for number, sample in enumerate(generations):
        if not isinstance(sample, dict) or not isinstance(sample.get("response"), str):
            raise UserError(f"{where}.all_generations[{number}].response: expected text")
        responses.append(sample["response"])
    costs = {
        "finished": [None if "finish" not in s else float(s["finish"] != "length") for s in generations],
        "new_tokens": [s.get("output_length") for s in generations],
        "kv_tokens_peak": [s.get("kv_tokens_peak") for s in generations],
        "kv_bytes_peak": [s.get("kv_bytes_peak") for s in generations],
    }
    complete = {name: tuple(map(float, values)) for name, values in costs.items() if _numbers(values)}
    key = str(entry.get("id", "")), str(entry.get("question", ""))
    return Sampled(key, str(answer), tuple(responses), complete)


def _numbers(values: list[Any]) -> bool:
    return all(isinstance(value, int | float) for value in values)


def _optional(path: Path, content: dict[str, Any], key: str, where: str = "") -> dict[str, Any]:
    value = content.get(key) or {}
    if not isinstance(value, dict):
        raise UserError(f"{path}: {where}{key}: expected an object, got {type(value).__name__}")
    return value


def _is_ask(path: Path) -> bool:
    content = _parse(path)
    return isinstance(content, dict) and content.get("kind") == KIND


def _parse(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text (byte {error.start})") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path} line {error.lineno}: not valid JSON: {error.msg}") from None
    except RecursionError:
        raise UserError(f"{path}: not valid JSON: nested too deeply") from None
