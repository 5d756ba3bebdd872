"""How many vectors a variable-length AutoCompressor makes, of what, and what that costs.

fit="python -m kvc fit --config configs/autocompressor/tiny_variable.yaml"
plain="--model.stop_draws 0 --model.stops_from 0"
fixed="--model.summary kvc.methods.autocompressor.summaries.Fixed --model.summary.summary_length 0"
$fit --run_dir runs/acv/none $plain $fixed --model.optim.lrs "{}"
$fit --run_dir runs/acv/full $plain --model.mode full_attention --model.summary null --model.optim.lrs "{}"
for lambda in 0.3 4; do
    $fit --run_dir runs/acv/lambda$lambda --model.summary.compression_lambda $lambda
done
for seed in 42 43 44; do
    $fit --run_dir runs/acv/lambda1-$seed --seed_everything $seed
done
for gate in after before log; do
    $fit --run_dir runs/acv/soft-$gate --model.stop_draws 0 --model.summary.gate $gate
done
python -m experiments.autocompressor_lengths runs/acv/* \
    --out experiments/results/autocompressor_lengths.json --png experiments/results/autocompressor_lengths.png

`vectors` of a segment are those of hard stops. `correlation` is Spearman's between them and the number of facts that
the segment tells. `hard - soft` is the loss with hard stops minus that with the weighted vectors of training. Numbers
are means over seeds, intervals resample documents.
"""

import sys
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments.autocompressor_documents import FULL, NOTHING, pooled, recovered
from experiments.pooling import Item, averaged, cell, parse
from kvc.core.files import atomic, write_json
from kvc.core.results import Value
from kvc.core.seeds import DEFAULT_SEED
from kvc.errors import UserError
from kvc.methods.autocompressor.scoring import METHOD, summarize

SOFT = "soft"


def settings_of(name: str) -> tuple[int, str, float]:
    """Most vectors, gate and lambda of a label; the gate says too whether stops were drawn in training."""
    most, gate, weight, *drawn = name.split(", ")
    return int(most.split()[2]), ", ".join([gate.removeprefix("gate "), *drawn]), float(weight.removeprefix("lambda "))


def segments(items: list[Item], name: str) -> list[list[dict[str, float]]]:
    """Facts and vectors of the segments of each document, vectors averaged over seeds."""
    found = []
    for arms in items:
        by_seed = [one["segments"] for one in arms[name]]
        found.append(
            [
                {"facts": same[0]["facts"], "vectors": float(np.mean([one["vectors"] for one in same]))}
                for same in zip(*by_seed)
            ]
        )
    return found


def measured(items: list[Item], name: str) -> dict[str, Any]:
    """Everything about one setting."""
    documents = averaged(items)
    records = [
        {"arms": {METHOD: document[name], SOFT: document[f"{name}, soft"]}, "segments": made}
        for document, made in zip(documents, segments(items, name))
    ]
    summary = summarize(records, DEFAULT_SEED)
    metrics = summary.metrics
    return {
        "vectors": metrics["vectors"],
        "loss": metrics["loss"],
        "answer_accuracy": metrics["answer_accuracy"],
        "recovered": recovered(documents, name),
        "soft_loss": summary.arms[SOFT]["loss"],
        "hard_minus_soft": summary.differences["loss"][SOFT],
        "correlation": metrics.get("facts_vectors_correlation"),
        "by_seed": [
            float(np.mean([s["vectors"] for arms in items for s in arms[name][k]["segments"]]))
            for k in range(len(items[0][name]))
        ],
        "by_facts": by_facts(segments(items, name)),
    }


def by_facts(found: list[list[dict[str, float]]]) -> dict[int, float]:
    """Mean vectors of the segments that tell so many facts."""
    groups: dict[int, list[float]] = {}
    for segment in (segment for document in found for segment in document):
        groups.setdefault(int(segment["facts"]), []).append(segment["vectors"])
    return {facts: float(np.mean(groups[facts])) for facts in sorted(groups)}


def table(rows: dict[str, dict[str, Any]]) -> str:
    """The figures in Markdown."""
    lines = [
        "| gate | lambda | vectors | by seed | loss | recovered | answers right | hard - soft | correlation |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        _, gate, weight = settings_of(name)
        related = row["correlation"]
        lines.append(
            f"| {gate} | {weight:g} | {cell(row['vectors'], 2)} | {' '.join(f'{v:.1f}' for v in row['by_seed'])} | "
            f"{cell(row['loss'])} | {cell(row['recovered'], 2)} | {cell(row['answer_accuracy'])} | "
            f"{cell(row['hard_minus_soft'], 4)} | {cell(related, 2) if related else 'all alike'} |"
        )
    return "\n".join(lines)


def picture(rows: dict[str, dict[str, Any]], nothing: Value, full: Value) -> Figure:
    """Loss against vectors along lambda, and vectors against facts."""
    figure = Figure(figsize=(10.5, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for gate in sorted({settings_of(name)[1] for name in rows}):
        names = sorted((n for n in rows if settings_of(n)[1] == gate), key=lambda n: settings_of(n)[2])
        xs, ys = ([rows[name][key] for name in names] for key in ("vectors", "loss"))
        bars = [
            [[abs(v.value - (v.low or v.value)), abs((v.high or v.value) - v.value)] for v in side] for side in (xs, ys)
        ]
        x, y = [value.value for value in xs], [value.value for value in ys]
        left.errorbar(
            x, y, xerr=np.array(bars[0]).T, yerr=np.array(bars[1]).T, marker="o", capsize=3, label=f"gate {gate}"
        )
        for name, here, there in zip(names, x, y):
            text = f"$\\lambda$ = {settings_of(name)[2]:g}"
            left.annotate(text, (here, there), (5, 5), textcoords="offset points", fontsize="x-small")
    for value, style, text in ((nothing, ":", NOTHING), (full, "-", FULL)):
        left.axhline(value.value, color="0.35", ls=style, lw=1.1, label=text)
    left.set_xlabel("vectors of a segment, hard stops")
    left.set_ylabel("loss per token of the last segment")
    gates = [settings_of(name)[1] for name in rows]
    most = max(gates, key=gates.count)
    for name in sorted(rows, key=settings_of):
        _, gate, weight = settings_of(name)
        known = rows[name]["by_facts"]
        if gate == most:
            right.plot(list(known), list(known.values()), marker="o", ms=3, label=f"$\\lambda$ = {weight:g}")
    right.set_xlabel("facts that the segment tells")
    right.set_ylabel("vectors of the segment")
    left.margins(x=0.12)
    for axis in (left, right):
        axis.grid(alpha=0.25)
        axis.legend(fontsize="x-small")
    return figure


def main(argv: list[str] | None = None) -> int:
    """Pool, print the table, write JSON and picture."""
    args = parse(__doc__, argv)
    try:
        items, sources = pooled(args.runs)
        names = [name for name in items[0] if f"{name}, soft" in items[0]]
        if not names:
            raise UserError("no run of variable length among them")
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    rows = {name: measured(items, name) for name in sorted(names, key=settings_of)}
    print(table(rows))
    plain = {
        name: {key: value.as_dict() if isinstance(value, Value) else value for key, value in row.items()}
        for name, row in rows.items()
    }
    write_json(args.out, {"n": len(items), "settings": plain, "runs": sources})
    if args.png is not None:
        controls = summarize(
            [{"arms": {METHOD: d[NOTHING], FULL: d[FULL]}, "segments": []} for d in averaged(items)], DEFAULT_SEED
        )
        with atomic(args.png) as temporary:
            figure = picture(rows, controls.metrics["loss"], controls.arms[FULL]["loss"])
            figure.savefig(temporary, format="png", dpi=150)
    return 0


if __name__ == "__main__":
    sys.exit(main())
