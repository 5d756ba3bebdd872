"""What a few slots are worth: runs of context compressors, several settings and seeds, in one table.

for seed in 42 43 44; do
    base=runs/sq/base-$seed full=runs/sq/full-$seed none=runs/sq/none-$seed
    python -m kvc test --config configs/squad/baselines.yaml --seed_everything $seed --run_dir $base
    fit="python -m kvc fit --config configs/squad/tiny.yaml --seed_everything $seed"
    control="--model.compressor null --model.source null"
    $fit --run_dir $full --model.mode full_text $control
    $fit --run_dir $none --model.mode no_context $control
    $fit --run_dir runs/sq/mean4-$seed --model.baselines "[$base, $full, $none]"
done
python -m experiments.squad_accuracy runs/sq/* \
    --out experiments/results/squad_tiny.json --png experiments/results/squad_tiny.png

Every arm answers the same held-out questions. Scores of a question are means over seeds, and intervals resample
questions, the same for all arms; `by_seed` has the F1 of each seed. `recovered` is
(arm - no context) / (full text - no context), both tuned on the same data, and empty where the full text is not worth
more than nothing. `ratio` is all tokens over all rows that stand for them. `ms` is the wall time of a question, of its
share of a batch: in all, and for reading the passage. Compressors are named with what is not at its default; `rN` is
one slot for N tokens, `MN` are N slots. Runs on several data sets (`data.split_seed`) are pooled question by question.
"""

import json
import sys
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.pooling import Item, Record, averaged, cell, data_key, parse, pool, read_run
from experiments.squad_labels import BASELINES, FULL, NOTHING, PARTS, UNTUNED, label, own, split
from kvc.core.files import atomic, write_json
from kvc.core.results import Value, bootstrap_mean, bootstrap_weights, interval
from kvc.core.seeds import DEFAULT_SEED
from kvc.errors import UserError
from kvc.methods.squad.scoring import COSTS, SCORES

NUMBERS = (*SCORES, *COSTS, "context_tokens")
STYLES = {FULL: "-", UNTUNED["full"]: "--", UNTUNED["no_context"]: "-.", NOTHING: ":"}


def pooled(folders: list[Path]) -> tuple[list[list[Item]], list[Record]]:
    """For each data set one entry for each question, with the scores of all arms by seed; and the sources.

    Raises:
        UserError: If a run is not finished, an arm was not measured on every question, or a control is missing.
    """
    by_data: dict[str, list[Path]] = {}
    for folder in folders:
        by_data.setdefault(data_key(read_run(folder)[1]), []).append(folder)
    measured = {label(folder) for folder in folders}
    groups, sources = [], []
    for part in by_data.values():
        items, found = pool(part, label, lambda name, arm: own(name, arm, measured), along=("context_tokens",))
        groups.append([{arm: [_numbers(one) for one in scores] for arm, scores in item.items()} for item in items])
        sources += found
    arms = set(groups[0][0])
    for control in (NOTHING, FULL):
        if control not in arms:
            raise UserError(f"no run of '{control}' among them")
    if other := next((arms ^ set(items[0]) for items in groups if set(items[0]) != arms), None):
        raise UserError(f"'{min(other)}' was not measured on all data sets: give the same arms for all")
    return groups, sources


def _numbers(scores: Record) -> Record:
    return {key: scores[key] for key in NUMBERS if key in scores}


def recovered(questions: list[dict[str, Record]], name: str, key: str) -> Value | None:
    """Share of what the full text is worth, with a paired interval; None where it is not worth more than nothing."""
    gap = _mean(_column(questions, FULL, key) - _column(questions, NOTHING, key))
    if gap.low is None or gap.low <= 0:
        return None
    full, ours = (_column(questions, arm, key) - _column(questions, NOTHING, key) for arm in (FULL, name))
    weights = _weights(len(questions))
    below = weights @ full
    share = (weights @ ours) / np.where(below == 0, np.nan, below)
    return interval(ours.mean() / full.mean(), share, len(questions))


def ratio(questions: list[dict[str, Record]], name: str) -> Value | None:
    """Tokens of all passages over the rows that stand for them; None where nothing does."""
    tokens = np.array([next(a["context_tokens"] for a in q.values() if "context_tokens" in a) for q in questions])
    rows = _column(questions, name, "kv_tokens_context")
    if not rows.sum():
        return None
    weights = _weights(len(questions))
    return interval(tokens.sum() / rows.sum(), (weights @ tokens) / (weights @ rows), len(questions))


def by_seed(groups: list[list[Item]], name: str) -> list[float]:
    """F1 of each seed, data set after data set."""
    means = [np.array([[one["f1"] for one in item[name]] for item in items]).mean(0) for items in groups]
    return [float(value) for value in np.concatenate(means)]


@lru_cache(maxsize=1)
def _weights(count: int) -> np.ndarray:
    """How often each question counts in each resample, the same for all figures."""
    return bootstrap_weights(count, DEFAULT_SEED).astype(float)


def _column(questions: list[dict[str, Record]], name: str, key: str) -> np.ndarray:
    return np.array([question[name][key] for question in questions], dtype=float)


def _mean(values: np.ndarray) -> Value:
    """A mean that may be of differences, so that 0 and 1 are not counts."""
    return interval(values.mean(), _weights(len(values)) @ values / len(values), len(values))


def figures(groups: list[list[Item]], sizes: dict[str, dict[str, float]]) -> dict[str, dict[str, Any]]:
    """All figures of every arm, in the order of the table."""
    questions = [question for items in groups for question in averaged(items)]
    rows = {}
    for name in sorted(questions[0], key=_place):
        row: dict[str, Any] = {
            key: bootstrap_mean(_column(questions, name, key).tolist(), DEFAULT_SEED) for key in SCORES
        }
        row |= {f"{key}_recovered": recovered(questions, name, key) for key in SCORES}
        row |= {
            f"{key}_below_full": _mean(_column(questions, FULL, key) - _column(questions, name, key)) for key in SCORES
        }
        row |= {"ratio": ratio(questions, name)}
        row |= {key: _mean(_column(questions, name, key)) for key in COSTS}
        rows[name] = {**row, "by_seed": by_seed(groups, name), **sizes.get(name, {})}
    return rows


def _place(name: str) -> tuple[Any, ...]:
    """Controls, the base model, compressors, then parts of the text; of each by budget."""
    line, budget = split(name)
    first = [FULL, NOTHING, *UNTUNED.values()]
    if budget is None:
        return (first.index(name), "", 0.0)
    return (len(first) + (line in PARTS.values()), line, _amount(budget))


def _amount(budget: str) -> float:
    digits = budget[1:].split("-")[0]
    return float(digits) if digits.replace(".", "", 1).isdigit() else 0.0


def costs_of(folders: list[Path]) -> dict[str, dict[str, float]]:
    """Parameters of each arm, and seconds of its training, the mean over runs."""
    found: dict[str, list[dict[str, Any]]] = {}
    for folder in folders:
        if (name := label(folder)) != BASELINES:
            found.setdefault(name, []).append(json.loads((folder / "result.json").read_text(encoding="utf-8")))
    return {
        name: {
            **{key: results[0]["sizes"][key] for key in ("compressor_parameters", "lora_parameters")},
            "fit_seconds": float(np.mean([result["timing"].get("fit_seconds", np.nan) for result in results])),
        }
        for name, results in found.items()
    }


def table(rows: dict[str, dict[str, Any]]) -> str:
    """The figures in Markdown."""
    columns = ["arm", "exact match", "F1", "by seed", "recovered, exact", "recovered, F1", "ratio"]
    columns += ["compressor parameters", "ms", "of it reading"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for name, row in rows.items():
        made, found = row.get("compressor_parameters"), row["ratio"]
        cells = [name, cell(row["em"]), cell(row["f1"]), " ".join(f"{value:.3f}" for value in row["by_seed"])]
        cells += [cell(share, 2) if (share := row[f"{key}_recovered"]) else "" for key in ("em", "f1")]
        cells += [f"{found.value:.2f}" if found else "", f"{made:,}" if made else ""]
        cells += [f"{1000 * row[key].value:.1f}" for key in ("seconds", "compress_seconds")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def lines_of(rows: dict[str, dict[str, Any]]) -> Iterator[tuple[str, list[tuple[Value, Value]]]]:
    """Ratio and F1 of the points of each line, by ratio."""
    found: dict[str, list[tuple[Value, Value]]] = {}
    for name, row in rows.items():
        line, budget = split(name)
        if budget is not None and row["ratio"] is not None:
            found.setdefault(line, []).append((row["ratio"], row["f1"]))
    for line, points in found.items():
        yield line, sorted(points, key=lambda point: point[0].value)


def picture(rows: dict[str, dict[str, Any]]) -> Figure:
    """F1 against the ratio that was really reached; lines stand a little beside each other, to keep bars apart."""
    figure = Figure(figsize=(9.6, 4.8), layout="constrained")
    axis = figure.subplots()
    lines = sorted(lines_of(rows), key=lambda line: line[0] in PARTS.values())
    count = sum(name not in PARTS.values() for name, _ in lines)
    for number, (name, points) in enumerate(lines):
        part = number >= count
        _line(axis, name, points, number - count if part else number, part, 2 ** (0.03 * (number - (count - 1) / 2)))
    for name, style in STYLES.items():
        if name in rows:
            thin = name in (FULL, NOTHING)
            settings = {"color": "0.2", "lw": 1.1} if thin else {"color": "0.75", "lw": 2.6, "zorder": 1}
            axis.axhline(rows[name]["f1"].value, ls=style, label=name, **settings)
    axis.set_xscale("log", base=2)
    if ratios := [found.value for _, points in lines for found, _ in points]:
        axis.set_xlim(min(ratios) / 1.3, max(ratios) * 1.3)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    axis.set_xlabel("tokens of the passage for each row that stands for them")
    axis.set_ylabel("F1")
    axis.grid(alpha=0.25)
    figure.legend(loc="outside right upper", fontsize="small", frameon=False)
    return figure


def _line(axis: Axes, name: str, points: list[tuple[Value, Value]], number: int, part: bool, beside: float) -> None:
    """One line, with bars where something was trained."""
    places = [(found.value if part else found.value * beside) for found, _ in points]
    heights = [score.value for _, score in points]
    marker = "osD^vPX*<>hp"[number % 12]
    if part:
        axis.plot(places, heights, label=name, color="0.6", marker=marker, ls=":", ms=4, lw=1.1)
        return
    ends = [[v.value if end is None else end for end in (v.low, v.high)] for _, v in points]
    bars = np.abs([[height - low, high - height] for height, (low, high) in zip(heights, ends)]).T
    settings = {"color": f"C{number % 10}", "marker": marker, "ms": 4.5, "lw": 1.3, "capsize": 2.5, "zorder": 3}
    axis.errorbar(places, heights, bars, label=name, **settings)


def main(argv: list[str] | None = None) -> int:
    """Pool, print the table, write JSON and picture."""
    args = parse(__doc__, argv)
    try:
        groups, sources = pooled(args.runs)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    rows = figures(groups, costs_of(args.runs))
    print(table(rows))
    print(f"\nfull text - no context, both tuned: F1 {cell(rows[NOTHING]['f1_below_full'])}, ", end="")
    print(f"exact match {cell(rows[NOTHING]['em_below_full'])}")
    write_json(
        args.out,
        {
            "n": sum(map(len, groups)),
            "data_sets": len(groups),
            "arms": {name: _plain(row) for name, row in rows.items()},
            "runs": sources,
        },
    )
    if args.png is not None:
        with atomic(args.png) as temporary:
            picture(rows).savefig(temporary, format="png", dpi=150)
    return 0


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    plain = {key: value.as_dict() if isinstance(value, Value) else value for key, value in row.items()}
    return {key: value for key, value in plain.items() if value is not None}


if __name__ == "__main__":
    sys.exit(main())
