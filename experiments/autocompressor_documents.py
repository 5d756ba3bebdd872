"""What summary vectors are worth: runs of one data set, several settings and seeds, in one table.

for seed in 42 43 44; do
    fit="python -m kvc fit --config configs/autocompressor/tiny.yaml --seed_everything $seed"
    $fit --run_dir runs/ac/none-$seed --model.summary.summary_length 0 --model.optim.lrs "{}"
    $fit --run_dir runs/ac/full-$seed --model.mode full_attention --model.summary null --model.optim.lrs "{}"
    $fit --run_dir runs/ac/fixed16-$seed
done
fit="python -m kvc fit --config configs/autocompressor/tiny.yaml"
$fit --run_dir runs/ac/replaced --model.summary.accumulate_summary false
$fit --run_dir runs/ac/random --model.randomize_substeps true
$fit --run_dir runs/ac/substeps --model.training_substeps 2 --model.segments_per_substep 2
$fit --run_dir runs/ac/fixed32 --model.summary.summary_length 32
python -m experiments.autocompressor_documents runs/ac/* \
    --out experiments/results/autocompressor_tiny.json --png experiments/results/autocompressor_tiny.png

On real text: the same with `--data.path FILE --data.lessons 0 --data.other_targets 1 --trainer.max_epochs 8`, in
another folder.

Every arm is scored on the last segment of the same held-out documents. The controls are tuned on the same data:
without any context, and with all of it. `recovered` is (nothing - arm) / (nothing - full), in loss per token;
`answers` are the words that only earlier facts tell. Scores of a document are means over seeds, and intervals resample
documents, the same for all arms; `by_seed` has the loss of each seed. "after k" reads only the last k segments as
vectors. A variable-length arm stops hard; "soft" reads the weighted vectors of training.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.pooling import Item, Record, averaged, cell, parse, pool
from kvc.core.files import atomic, write_json
from kvc.core.results import Summary, Value, bootstrap_weights, interval
from kvc.core.seeds import DEFAULT_SEED
from kvc.errors import UserError
from kvc.methods.autocompressor.scoring import METHOD, RATIOS, summarize

NOTHING, FULL = "no context, tuned", "full text, tuned"
BASE = {"base_no_context": "no context, base model", "base_full": "full text, base model"}


def label(folder: Path) -> str:
    """Name of what a run trained, from its configuration."""
    model = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))["model"]["init_args"]
    if model["mode"] == "full_attention":
        return FULL
    kind, settings = model["summary"]["class_path"].rsplit(".", 1)[1], model["summary"]["init_args"]
    if kind == "Fixed":
        if not settings["summary_length"]:
            return NOTHING
        name = f"{settings['summary_length']} vectors"
        name += "" if settings["accumulate_summary"] else ", replaced"
    else:
        name = f"up to {settings['compression_max_len']} vectors, gate {settings['gate']}"
        name += f", lambda {settings['compression_lambda']:g}"
        name += ", drawn" if model["stop_draws"] else ""
    name += ", random segments" if model["randomize_substeps"] else ""
    return name + (f", {model['training_substeps']} substeps" if model["training_substeps"] > 1 else "")


def own(name: str, arm: str) -> str | None:
    """The name under which the table keeps an arm of a run."""
    if arm == METHOD:
        return name
    if arm in BASE:
        return BASE[arm]
    if name in (NOTHING, FULL) or arm == "full":
        return None
    return f"{name}, after 0" if arm == "no_context" else f"{name}, {arm.replace('_', ' ')}"


def pooled(folders: list[Path]) -> tuple[list[Item], list[Record]]:
    """One entry for each document, with the scores of all arms by seed, and the sources.

    Raises:
        UserError: If a run is not finished, an arm was not measured on every document, or a control is missing.
    """
    items, sources = pool(folders, label, own, along=("segments",))
    for control in (NOTHING, FULL):
        if control not in items[0]:
            raise UserError(f"no run of '{control}' among them")
    return items, sources


def recovered(documents: list[dict[str, Record]], name: str, loss: str = "loss") -> Value | None:
    """Share of the gap between the two controls; None where there is no gap."""
    top, bottom = RATIOS[loss]
    weights = bootstrap_weights(len(documents), DEFAULT_SEED)
    ones = np.ones((1, len(documents)))
    found = []
    for drawn in (ones, weights):
        values = {
            arm: (drawn @ np.array([d[arm][top] for d in documents]))
            / np.maximum(drawn @ np.array([d[arm][bottom] for d in documents]), 1e-9)
            for arm in (NOTHING, FULL, name)
        }
        gap = values[NOTHING] - values[FULL]
        if drawn is ones and gap[0] <= 0:
            return None
        found.append((values[NOTHING] - values[name]) / gap)
    return interval(found[0][0], found[1], len(documents))


def by_seed(items: list[Item], name: str) -> list[float]:
    """Loss per token of each seed."""
    sums = np.array([[[one["nll"], one["tokens"]] for one in arms[name]] for arms in items]).sum(0)
    return [float(value) for value in sums[:, 0] / sums[:, 1]]


def measured(documents: list[dict[str, Record]]) -> tuple[dict[str, dict[str, Value]], Summary]:
    """Metrics of every arm, and the differences of the tuned control without context to each (control - arm)."""
    compared = [
        {"arms": {METHOD: arms[NOTHING], **{name: arms[name] for name in arms if name != NOTHING}}, "segments": []}
        for arms in documents
    ]
    summary = summarize(compared, DEFAULT_SEED)
    return {NOTHING: summary.metrics, **summary.arms}, summary


def table(rows: dict[str, dict[str, Any]]) -> str:
    """The figures in Markdown."""
    lines = [
        "| arm | loss, last segment | by seed | nothing - arm | recovered | answers right | rows of context |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        share, gain, answers = row["recovered"], row["gain"], row["metrics"].get("answer_accuracy")
        lines.append(
            f"| {name} | {cell(row['metrics']['loss'])} | {' '.join(f'{v:.3f}' for v in row['by_seed'])} | "
            f"{cell(gain) if gain else ''} | {cell(share, 2) if share else ''} | {cell(answers) if answers else ''} | "
            f"{100 * row['metrics']['kv_share'].value:.1f} % |"
        )
    return "\n".join(lines)


def picture(rows: dict[str, dict[str, Any]]) -> Figure:
    """Loss by number of segments that stand as vectors, and what each setting recovers."""
    figure = Figure(figsize=(10.5, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    settings = [name for name in rows if " vectors" in name and ", after " not in name and ", soft" not in name]
    for name in settings:
        after = {int(key.rsplit(" ", 1)[1]): key for key in rows if key.startswith(f"{name}, after ")}
        points = [after[count] for count in sorted(after)] + [name]
        _bars(left, range(len(points)), [rows[point]["metrics"]["loss"] for point in points], name)
    for name, style in ((NOTHING, ":"), (FULL, "-")):
        left.axhline(rows[name]["metrics"]["loss"].value, color="0.35", ls=style, lw=1.1, label=name)
    left.set_xlabel("earlier segments read as vectors")
    left.set_ylabel("loss per token of the last segment")
    left.xaxis.get_major_locator().set_params(integer=True)
    left.legend(fontsize="x-small")
    shares = [rows[name]["recovered"] for name in settings]
    places = np.arange(len(settings))
    low, high = ([abs(s.value - (end or s.value)) for s, end in zip(shares, ends)] for ends in _ends(shares))
    right.barh(places, [share.value for share in shares], xerr=[low, high], color="C0", capsize=3)
    right.set_yticks(places, [name.replace(", ", ",\n", 1) for name in settings], fontsize="x-small")
    right.invert_yaxis()
    right.axvline(1, color="0.35", lw=1.1)
    right.set_xlabel("share of the gap that is recovered")
    for axis in (left, right):
        axis.grid(alpha=0.25)
    return figure


def _ends(values: list[Value]) -> tuple[list[float | None], list[float | None]]:
    return [value.low for value in values], [value.high for value in values]


def _bars(axis: Axes, places: range, values: list[Value], name: str) -> None:
    heights = [value.value for value in values]
    low, high = ([abs(h - (end or h)) for h, end in zip(heights, ends)] for ends in _ends(values))
    axis.errorbar(places, heights, [low, high], marker="o", capsize=3, ms=4, label=name)


def main(argv: list[str] | None = None) -> int:
    """Pool, print the table, write JSON and picture."""
    args = parse(__doc__, argv)
    try:
        items, sources = pooled(args.runs)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    documents = averaged(items)
    metrics, summary = measured(documents)
    order = [NOTHING, FULL, *sorted(set(metrics) - {NOTHING, FULL})]
    rows = {
        name: {
            "metrics": metrics[name],
            "recovered": None if name == NOTHING else recovered(documents, name),
            "answer_recovered": None if name == NOTHING else recovered(documents, name, "answer_loss"),
            "gain": summary.differences["loss"].get(name),
            "by_seed": by_seed(items, name),
        }
        for name in order
    }
    print(table(rows))
    write_json(args.out, {"n": len(items), "arms": {name: _plain(row) for name, row in rows.items()}, "runs": sources})
    if args.png is not None:
        with atomic(args.png) as temporary:
            picture(rows).savefig(temporary, format="png", dpi=150)
    return 0


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    plain = {key: value.as_dict() for key, value in row["metrics"].items()}
    named = {"recovered", "answer_recovered", "gain"}
    plain |= {key: row[key].as_dict() for key in sorted(named) if row[key] is not None}
    return {**plain, "by_seed": row["by_seed"]}


if __name__ == "__main__":
    sys.exit(main())
