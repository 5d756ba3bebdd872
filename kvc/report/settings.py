"""Which settings differ between runs."""

from typing import Any

from kvc.runs import identity_of

ABSENT = "-"
NOT_SETTINGS = {"checkpoint"}
"""What an evaluation notes beside the settings: the name of the weights, which differ whenever anything does."""


def differing(results: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Settings that decide what a run computes and are not the same everywhere: key to run to value.

    Args:
        results: Label of a run to its `result.json`.
    """
    configs = {run: identity_of(result.get("config") or {}) for run, result in results.items()}
    keys = dict.fromkeys(key for config in configs.values() for key in config if key and key not in NOT_SETTINGS)
    table = {}
    for key in keys:
        values = {run: config.get(key) for run, config in configs.items()}
        # Parts take their seed from the one of the run, unless they were given another.
        follows = key.endswith(".init_args.seed") and values == {
            run: c.get("seed_everything") for run, c in configs.items()
        }
        if len({repr(value) for value in values.values()}) > 1 and not follows:
            table[key] = values
    return table


def shorten(keys: list[str]) -> dict[str, str]:
    """The last parts of dotted keys, as many as it takes to tell them apart.

    `model.init_args.optim.lr` becomes `lr`, unless another key ends like that too.
    """
    parts = {key: key.replace(".init_args", "").split(".") for key in keys}
    names = {}
    for key, words in parts.items():
        for depth in range(1, len(words) + 1):
            tail = words[-depth:]
            if sum(other[-depth:] == tail for other in parts.values()) == 1:
                break
        names[key] = ".".join(tail)
    return names if len(set(names.values())) == len(names) else {key: key for key in keys}


def say(value: Any) -> str:
    """A setting as it stands in YAML."""
    if value is None:
        return ABSENT
    if isinstance(value, bool):
        return str(value).lower()
    return str(value)
