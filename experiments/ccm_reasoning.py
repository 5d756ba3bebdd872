"""What a compressed memory is worth: runs of `configs/ccm/tiny.yaml`, several kinds, sizes and seeds, in one table.

for seed in 42 43 44; do
    fit="python -m kvc fit --config configs/ccm/tiny.yaml --seed_everything $seed"
    $fit --name ccm/control-$seed --model.kind full --model.cond_lora false --model.optim.lrs "{}"
    $fit --name ccm/concat4-$seed
    $fit --name ccm/merge8-$seed --model.slots 8 --model.kind merge_recur
done
python -m experiments.ccm_reasoning runs/ccm/* \
    --out experiments/results/ccm_tiny.json --png experiments/results/ccm_tiny.png

Every arm is measured on the same held-out traces, teacher-forced at their own COMPs: exact match of every token of the
last segment. `recovered` is (arm - no context) / (control - no context). Scores of a trace are means over seeds, and
intervals resample traces, the same for all arms; `by_seed` has the exact match of each seed.
"""

import sys
from pathlib import Path

import numpy as np
import yaml
from matplotlib.figure import Figure

from experiments.pooling import Item, Record, averaged, cell, parse, pool
from kvc.core.files import atomic, write_json
from kvc.core.results import Summary, Value, bootstrap_weights, interval
from kvc.core.seeds import DEFAULT_SEED
from kvc.errors import UserError
from kvc.methods.ccm.module import ISOLATED
from kvc.methods.ccm.scoring import METHOD, UNTRAINED, summarize

CONTROL, FULL, NOTHING = "control", "full", "no_context"
COLUMNS = {"token_accuracy": 3, "nll": 3, "kv_tokens_peak": 0, "kv_share": 3}


def label(folder: Path) -> str:
    """Name of what a run trained, from its configuration."""
    model = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))["model"]["init_args"]
    kind, slots = model["kind"], model["slots"]
    if kind in {FULL, NOTHING}:
        return CONTROL if kind == FULL else f"{kind}, tuned"
    name = f"{kind.removesuffix('_recur')} n={slots}"
    if kind in ISOLATED:
        name = f"isolated {name}"
    return f"{name}, distilled" if model.get("distillation") else name


def pooled(folders: list[Path]) -> tuple[list[Item], list[Record]]:
    """One entry for each trace, with the scores of all arms by seed, and the sources.

    Raises:
        UserError: If a run is not finished, or some arm was not measured on every trace with every seed.
    """

    def own(name: str, arm: str) -> str:
        return {METHOD: name, UNTRAINED: f"{name}, {UNTRAINED}"}.get(arm, arm)

    items, sources = pool(folders, label, own)
    if CONTROL not in items[0]:
        raise UserError("no run of the control (--model.kind full --model.cond_lora false) among them")
    for name, seeds in items[0].items():
        if len(seeds) != len(items[0][FULL]):
            raise UserError(f"'{name}' was not measured with every seed: give runs of the same seeds for all arms")
    first = [CONTROL, FULL, NOTHING]
    order = [*first, *sorted(set(items[0]) - set(first))]
    return [{name: arms[name] for name in order} for arms in items], sources


def recovered(traces: list[dict[str, Record]], name: str) -> Value:
    """Share of the gap between the control and no context."""
    exact = {arm: np.array([trace[arm]["exact"] for trace in traces]) for arm in (CONTROL, NOTHING, name)}
    gap, ours = exact[CONTROL] - exact[NOTHING], exact[name] - exact[NOTHING]
    if gap.mean() <= 0:
        raise UserError("the control is no better than no context: there is nothing to recover")
    weights = bootstrap_weights(len(traces), DEFAULT_SEED)
    return interval(ours.mean() / gap.mean(), (weights @ ours) / (weights @ gap), len(traces))


def by_seed(records: list[Item], name: str) -> list[float]:
    """Exact match of each seed."""
    hits = np.array([[float(one["exact"]) for one in arms[name]] for arms in records])
    return [float(value) for value in hits.mean(0)]


def table(arms: dict[str, dict[str, Value]], shares: dict[str, Value], seeds: dict[str, list[float]]) -> str:
    """The figures in Markdown."""
    lines = [
        "| arm | exact | by seed | recovered | right tokens | loss a token | peak rows | KV |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, values in arms.items():
        rest = " | ".join(f"{values[column].value:.{digits}f}" for column, digits in COLUMNS.items())
        share = cell(shares[name], 2) if name not in {CONTROL, NOTHING} else ""
        each = " ".join(f"{value:.3f}" for value in seeds[name])
        lines.append(f"| {name} | {cell(values['exact'])} | {each} | {share} | {rest} |")
    return "\n".join(lines)


def picture(arms: dict[str, dict[str, Value]]) -> Figure:
    """Exact match against the rows of KV that stand for the finished segments."""
    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    axis = figure.subplots()
    for name, marker, color in (("concat", "o", "C0"), ("merge", "s", "C1")):
        points = [
            (values["kv_share"].value, values["exact"], arm.split()[1])
            for arm, values in arms.items()
            if arm.startswith(name) and "," not in arm
        ]
        if not points:
            continue
        points.sort(key=lambda point: point[0])
        shares, exact = [100 * point[0] for point in points], [point[1] for point in points]
        ends = [[v.value if end is None else end for end in (v.low, v.high)] for v in exact]
        bars = np.abs([[v.value - low, high - v.value] for v, (low, high) in zip(exact, ends)]).T
        heights = [v.value for v in exact]
        axis.errorbar(shares, heights, bars, label=f"CCM-{name}", color=color, marker=marker, capsize=3)
        for x, y, (_, _, size) in zip(shares, heights, points):
            axis.annotate(size, (x, y), (7, -4), textcoords="offset points", fontsize="small", color=color)
    for arm, style, text in (
        (CONTROL, "-", "tuned with the full context (100 % of the rows)"),
        (FULL, "--", "base model, full context"),
        (NOTHING, ":", "no context"),
    ):
        axis.axhline(arms[arm]["exact"].value, color="0.35", ls=style, lw=1.1, label=text)
    axis.set_xlabel("rows of KV that stand for the finished segments, % of their tokens")
    axis.set_ylabel("last segment exactly right")
    axis.set_xlim(0, 1.15 * axis.get_xlim()[1])
    axis.set_ylim(-0.03, 1.05)
    axis.grid(alpha=0.25)
    figure.legend(fontsize="small", loc="outside lower center", ncols=3)
    return figure


def main(argv: list[str] | None = None) -> int:
    """Pool, print the table, write JSON and picture."""
    args = parse(__doc__, argv)
    try:
        records, sources = pooled(args.runs)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    traces = averaged(records)
    # The control takes the method's place, so that every arm is compared with it on the same traces.
    compared = [
        {"arms": {METHOD: trace[CONTROL], **{name: trace[name] for name in trace if name != CONTROL}}}
        for trace in traces
    ]
    summary: Summary = summarize(compared, DEFAULT_SEED)
    arms = {CONTROL: summary.metrics, **summary.arms}
    shares = {name: recovered(traces, name) for name in arms}
    seeds = {name: by_seed(records, name) for name in arms}
    print(table(arms, shares, seeds))
    result = {
        "n": len(records),
        "arms": {
            name: {
                **{key: value.as_dict() for key, value in values.items()},
                "recovered": shares[name].as_dict(),
                "by_seed": seeds[name],
            }
            for name, values in arms.items()
        },
        "control_minus_arm": summary.as_dict()["differences"],
        "runs": sources,
    }
    write_json(args.out, result)
    if args.png is not None:
        with atomic(args.png) as temporary:
            picture(arms).savefig(temporary, format="png", dpi=150)
    return 0


if __name__ == "__main__":
    sys.exit(main())
