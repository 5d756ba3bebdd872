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

from experiments.pooling import Record, data_key, parse, read_run
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


def pooled(folders: list[Path]) -> tuple[list[Record], list[Record]]:
    """One record for each trace, with the scores of all arms by seed, and the sources.

    Raises:
        UserError: If a run is not finished, or some arm was not measured on every trace with every seed.
    """
    traces: dict[tuple[str, int], dict[str, dict[int, Record]]] = {}
    sources = []
    for folder in folders:
        found, source = read_run(folder)
        name, seed = label(folder), source["seed"]
        sources.append({"arm": name, **source})
        for record in found:
            arms = traces.setdefault((data_key(source), record["id"]), {})
            if seed in arms.get(name, {}):
                raise UserError(f"{folder}: a second run of '{name}' with the seed {seed} on the same data")
            for other, scores in record["arms"].items():
                own = {METHOD: name, UNTRAINED: f"{name}, {UNTRAINED}"}
                arms.setdefault(own.get(other, other), {})[seed] = scores
    wanted = {name: set(seeds) for arms in traces.values() for name, seeds in arms.items()}
    for arms in traces.values():
        for name, seeds in wanted.items():
            if set(arms.get(name, {})) != seeds or seeds != wanted[FULL]:
                raise UserError(f"'{name}' was not measured on all traces: give runs of the same seeds for all arms")
    if CONTROL not in wanted:
        raise UserError("no run of the control (--model.kind full --model.cond_lora false) among them")
    first = [CONTROL, FULL, NOTHING]
    order = [*first, *sorted(set(wanted) - set(first))]
    return [
        {name: [arms[name][seed] for seed in sorted(arms[name])] for name in order} for arms in traces.values()
    ], sources


def averaged(records: list[Record]) -> list[Record]:
    """Scores of each trace, the mean over seeds: traces are what intervals resample."""
    return [
        {name: {key: float(np.mean([one[key] for one in seeds])) for key in seeds[0]} for name, seeds in arms.items()}
        for arms in records
    ]


def recovered(traces: list[Record], name: str) -> Value:
    """Share of the gap between the control and no context."""
    exact = {arm: np.array([trace[arm]["exact"] for trace in traces]) for arm in (CONTROL, NOTHING, name)}
    gap, ours = exact[CONTROL] - exact[NOTHING], exact[name] - exact[NOTHING]
    if gap.mean() <= 0:
        raise UserError("the control is no better than no context: there is nothing to recover")
    weights = bootstrap_weights(len(traces), DEFAULT_SEED)
    return interval(ours.mean() / gap.mean(), (weights @ ours) / (weights @ gap), len(traces))


def by_seed(records: list[Record], name: str) -> list[float]:
    """Exact match of each seed."""
    hits = np.array([[float(one["exact"]) for one in arms[name]] for arms in records])
    return [float(value) for value in hits.mean(0)]


def cell(value: Value, digits: int = 3) -> str:
    """A number with its interval."""
    if value.low is None or value.high is None:
        return f"{value.value:.{digits}f}"
    return f"{value.value:.{digits}f} [{value.low:.{digits}f}, {value.high:.{digits}f}]"


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
