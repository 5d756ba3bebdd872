"""`python -m kvc ablations`: finished compressors in the files of the brief, and one experiment as a Python call."""

import argparse
import csv
import io
import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvc.commands import CommandParser
from kvc.errors import UserError

if TYPE_CHECKING:
    from kvc.methods.squad.brief import CompressionConfig

EPILOG = """\
examples:
  python -m kvc ablations runs/squad-ablations/train/* --out runs/compression_ablations

writes, for each run, FOLDER/M64_cross_attention_HASH_s42/
  config.json metrics.json sample_predictions.json predictions.jsonl
  adapter_model.safetensors kvc.safetensors kvc.json ...    (an export: kvc.load reads it back)
and FOLDER/results_summary.json and .csv of all runs that the folder holds. HASH names losses, source and the like.
"""
SAMPLES = 10
SUMMARY = ("final_f1", "final_em", "baseline_f1", "baseline_em", "compression_ratio", "nominal_ratio")
TRAINING, VALIDATION = "train/", "val/"


def parser() -> argparse.ArgumentParser:
    """Arguments of the command."""
    result = CommandParser(
        prog="python -m kvc ablations",
        description="Write finished context compressors as metrics.json, sample_predictions.json and weights.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument("runs", metavar="RUN", nargs="+", help="folder of a finished run of a context compressor")
    result.add_argument("--out", metavar="FOLDER", default="runs/compression_ablations", help="default: %(default)s")
    return result


def main(argv: list[str]) -> int:
    """Export runs; a run that was exported before is written anew.

    Args:
        argv: Arguments after `ablations`.

    Returns:
        Exit code.
    """
    options = parser().parse_args(argv)
    out = Path(options.out)
    for run in options.runs:
        print(f"exported {run} to {write_ablation(Path(run), out)}")
    print(f"wrote {write_summary(out)}")
    return 0


def write_ablation(run: Path, out: Path) -> Path:
    """Write one run.

    Args:
        run: Its folder.
        out: Folder of the experiments.

    Returns:
        The folder written.

    Raises:
        UserError: If it is no finished run of a context compressor, or the folder cannot be written.
    """
    from kvc.commands.export import main as export
    from kvc.core.files import write_json, write_text
    from kvc.methods.squad.brief import METHOD, results_of, run_name
    from kvc.methods.squad.module import ContextCompressor
    from kvc.runs import PREDICTIONS, RunFolder

    folder = RunFolder(run)
    config, result = folder.read_config(), folder.read_result()
    names = {METHOD, f"{ContextCompressor.__module__}.{ContextCompressor.__qualname__}"}
    if (path := config.get("model", {}).get("class_path")) not in names:
        raise UserError(f"{run} is a run of {path}, not of a context compressor")
    target = out / run_name(config["model"], result.get("seed"))
    export([str(run), str(target), "--overwrite"])
    text = (folder.evaluation(result["split"]).path / PREDICTIONS).read_text(encoding="utf-8")
    samples = [json.loads(line) for line in text.splitlines()[:SAMPLES]]
    settings = {**config, **{key: result.get(key) for key in ("git", "versions", "machine")}, "run": str(run)}
    try:
        write_json(target / "config.json", settings)
        write_text(target / PREDICTIONS, text)
        write_json(target / "sample_predictions.json", [_sample(sample) for sample in samples])
        write_json(target / "metrics.json", {**results_of(result), **_curves(run)})
    except OSError as error:
        raise UserError(f"cannot write to {target}: {error.strerror}") from error
    return target


def write_summary(out: Path) -> Path:
    """Write `results_summary.json` and `.csv` of every experiment below a folder.

    Returns:
        The JSON file.
    """
    from kvc.core.files import write_json, write_text

    rows = []
    for path in sorted(out.glob("*/metrics.json")):
        metrics = json.loads(path.read_text(encoding="utf-8"))
        parameters = metrics["params"]["compressor"]
        rows.append({"run": path.parent.name, **{k: metrics[k] for k in SUMMARY}, "compressor_parameters": parameters})
    table = io.StringIO()
    writer = csv.DictWriter(table, ["run", *SUMMARY, "compressor_parameters"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(out / "results_summary.csv", table.getvalue())
    write_json(out / "results_summary.json", rows)
    return out / "results_summary.json"


def run_single_ablation(config: "CompressionConfig", gpu_id: int | None = None) -> dict[str, Any]:
    """Train and test one compressor; the same configuration again only reads its results.

    Args:
        config: The experiment.
        gpu_id: Number of the GPU; None for the CPU.

    Returns:
        See `kvc.methods.squad.brief.results_of`; also `run`, its folder.

    Raises:
        UserError: If it failed; what went wrong has been printed.
    """
    import yaml

    from kvc.__main__ import main as kvc
    from kvc.core.files import digest
    from kvc.methods.squad.brief import results_of, run_name
    from kvc.runs import RunFolder

    settings = config.as_config()
    device = {"accelerator": "cpu", "devices": 1, "deterministic": True, "precision": "32-true"}
    if gpu_id is not None:
        device = {"accelerator": "gpu", "devices": [gpu_id], "precision": "bf16-mixed"}
        settings["model"]["init_args"]["backbone"]["dtype"] = "bfloat16"
    settings["trainer"] |= device
    name = f"{run_name(settings['model'], config.seed)}_{digest(asdict(config))[:4]}"
    run = RunFolder(Path(config.output_dir) / name)
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "config.yaml"
        path.write_text(yaml.safe_dump(settings), encoding="utf-8")
        if kvc(["fit", "--config", str(path), "--run_dir", str(run.path)]):
            raise UserError(f"the experiment {name} failed, see above")
    return {**results_of(run.read_result()), "run": str(run.path)}


def _sample(record: dict[str, Any]) -> dict[str, Any]:
    return {key: record[key] for key in ("id", "question", "completion", "answer", "golds", "f1", "em")}


def _curves(run: Path) -> dict[str, Any]:
    """Each term of the loss over the steps, and the loss of the validation."""
    from kvc.report.curves import read_scalars

    try:
        scalars = read_scalars(run)
    except (OSError, ValueError):
        return {"curves": {}}
    kept = {tag: curve for tag, curve in scalars.items() if tag.startswith((TRAINING, VALIDATION))}
    steps = kept.get("val/loss", [])
    best = min(steps, key=lambda point: point[1])[0] if steps else None
    return {"curves": {tag: [[step, value] for step, value in curve] for tag, curve in kept.items()}, "best_step": best}
