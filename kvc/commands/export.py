"""`python -m kvc export`: a finished run as a folder of standard formats, here or on the Hub."""

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from kvc.commands import CommandParser
from kvc.errors import UserError

EPILOG = """\
examples:
  python -m kvc export runs/first exported/first
  python -m kvc export runs/tiny-lm data/tiny-lm --overwrite   (other files of the folder stay)
  python -m kvc export runs/first me/my-compressor --private   (needs a write token in HF_TOKEN)

load it again:
  python -c "import kvc; method = kvc.load('exported/first')"

OWNER/NAME means the Hub unless a folder OWNER is here; ./OWNER/NAME is always a folder.
"""


def parser() -> argparse.ArgumentParser:
    """Arguments of the command."""
    result = CommandParser(
        prog="python -m kvc export",
        description="Write a trained method as safetensors, PEFT and JSON files, with a model card.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument("run", metavar="RUN", help="folder of a finished run")
    result.add_argument("target", metavar="DIR|HUB_ID", help="folder to write, or owner/name on the Hub")
    result.add_argument("--overwrite", action="store_true", help="write into a folder or repository that exists")
    result.add_argument("--private", action="store_true", help="make a new Hub repository private")
    return result


def main(argv: list[str]) -> int:
    """Export one run.

    Args:
        argv: Arguments after `export`.

    Returns:
        Exit code.
    """
    options = parser().parse_args(argv)
    from kvc.loading import looks_like_hub_id

    to_hub = looks_like_hub_id(options.target)
    if options.private and not to_hub:
        raise UserError(f"--private is for the Hub, and {options.target} is a folder")
    if to_hub:
        _check_token(options.target)

    from transformers.utils import logging

    from kvc.core.export import write_export
    from kvc.core.method import Method
    from kvc.loading import load_run
    from kvc.runs import RunFolder

    run = RunFolder(Path(options.run))
    config, result = run.read_config(), run.read_result()
    # The bars of transformers would be the only output of a command that takes seconds.
    logging.disable_progress_bar()
    method = load_run(run)
    if not isinstance(method, Method):
        raise UserError(f"{run.path}: {type(method).__name__} trains nothing, so there is nothing to export")
    manifest = manifest_of(config["model"], result, method.base_identity())
    if to_hub:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / "export"
            write_export(method, folder, manifest, card(manifest, options.target))
            print(f"exported {run.path} to {_push(folder, options.target, options.overwrite, options.private)}")
        return 0
    write_export(method, Path(options.target), manifest, card(manifest, options.target), options.overwrite)
    print(f"exported {run.path} to {options.target}")
    return 0


def manifest_of(model: dict[str, Any], result: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    """What `kvc.json` says: how to build the method again, and what was measured."""
    from kvc import __version__
    from kvc.core.export import SCHEMA

    return {
        "schema": SCHEMA,
        "kvc_version": __version__,
        "method": model["class_path"],
        "model": model,
        "base_model": base,
        "seed": result.get("seed"),
        "data": {"hash": result.get("data", {}).get("hash")},
        **{key: result.get(key, {}) for key in ("metrics", "arms", "differences")},
    }


def card(manifest: dict[str, Any], target: str) -> str:
    """The model card: what it is, what was measured, how to load it."""
    name, base = manifest["method"].rsplit(".", 1)[-1], manifest["base_model"]
    backbone = (manifest["model"].get("init_args") or {}).get("backbone") or {}
    # The Hub takes an id here, not the path of a folder.
    base_name = _short(str(base.get("name", "")))
    header: dict[str, Any] = {"library_name": "kvc", "tags": ["kvc", "context-compression", "kv-cache"]}
    if backbone.get("from_config"):
        origin = f"from random weights of the shape of `{base_name}`"
    else:
        origin = f"on the base model `{base_name}` (hash `{base.get('hash', '')}`)"
        header = {"base_model": base_name, **header}
    arms = {"method": manifest["metrics"], **manifest["arms"]}
    lines = [
        "\n".join(["---", *(f"{key}: {json.dumps(value)}" for key, value in header.items()), "---"]),
        f"# {Path(target).name}",
        f"`{name}` (`{manifest['method']}`), trained with kvc {manifest['kvc_version']} {origin}, "
        f"seed {manifest['seed']}, data hash `{manifest['data']['hash']}`.",
        "## Results",
        f"With 95 % intervals.\n\n{_markdown(arms)}",
        "## Use",
        f'```python\nimport kvc\n\nmethod = kvc.load("{_short(target)}")\n```',
        "`kvc.json` holds the configuration. `model.safetensors`, where there is one, is a plain transformers model,\n"
        "`adapter_model.safetensors` a plain PEFT adapter, `kvc.safetensors` everything else that was trained.",
    ]
    return "\n\n".join(lines) + "\n"


def _short(text: str) -> str:
    """An id as it is; of a path, which means nothing elsewhere, the last part."""
    return Path(text).name if text.startswith((".", "/", "~")) or text.count("/") > 1 else text


def _markdown(arms: dict[str, dict[str, Any]]) -> str:
    """One row a metric, one column for the method and each arm."""
    from kvc.report.table import cell

    names = list(dict.fromkeys(name for values in arms.values() for name in values))
    rows = [["metric", "n", *arms], ["---"] * (len(arms) + 2)]
    for name in names:
        counts = [values[name]["n"] for values in arms.values() if values.get(name, {}).get("n") is not None]
        rows.append([name, str(counts[0]) if counts else "", *(cell(values.get(name)) for values in arms.values())])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _check_token(target: str) -> None:
    """Fail before anything is loaded, and say how a folder is meant."""
    hint = f"cannot push to '{target}' on the Hub (./{target} would be a folder)"
    if os.environ.get("HF_HUB_OFFLINE", "0") not in {"", "0"}:
        raise UserError(f"{hint}: HF_HUB_OFFLINE is set")
    from huggingface_hub import get_token

    if get_token() is None:
        raise UserError(f"{hint}: there is no token, set HF_TOKEN")


def _push(folder: Path, name: str, overwrite: bool, private: bool) -> str:
    """Upload; returns the address of the repository."""
    from huggingface_hub import HfApi

    from kvc.core.export import ADAPTER, ADAPTER_CONFIG, TENSORS
    from kvc.loading import hub_failure

    api = HfApi()
    try:
        if not overwrite and api.repo_exists(name):
            raise UserError(f"'{name}' exists on the Hub: pass --overwrite to add a new version")
        address = api.create_repo(name, private=private or None, exist_ok=overwrite)
        # An earlier version may have left files in another format; those of this version are uploaded anew.
        stale = [TENSORS, ADAPTER, ADAPTER_CONFIG, "model*.safetensors", "model.safetensors.index.json"]
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="kvc export", delete_patterns=stale)
    except UserError:
        raise
    except Exception as error:  # the Hub client raises from four libraries
        raise hub_failure(f"cannot push to '{name}' on the Hub", error) from error
    return str(address)
