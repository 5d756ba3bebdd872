"""Accuracy against budget of every policy, pooled over runs of `configs/rkv/tiny.yaml` with different data seeds.

for seed in 42 43 44; do
    python -m kvc test --config configs/rkv/tiny.yaml --name rkv-$seed --seed_everything $seed
done
python -m experiments.rkv_accuracy runs/rkv-42 runs/rkv-43 runs/rkv-44 \
    --out experiments/results/rkv_tiny.json --png experiments/results/rkv_tiny.png
"""

import sys
from pathlib import Path
from typing import Any

from experiments.pooling import data_key, parse, read_run
from kvc.core.files import atomic, write_json
from kvc.core.results import Summary, Value
from kvc.errors import UserError
from kvc.methods.rkv.picture import accuracy_by_budget
from kvc.methods.rkv.summary import FULL, summarize

COLUMNS = ("accuracy", "compressions", "fired", "kv_tokens_peak", "kv_tokens_mean", "new_tokens")


def pooled(folders: list[Path]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Records of all runs, and where they come from.

    Raises:
        UserError: If a run is not finished, or two runs measured the same data.
    """
    records, sources, seen = [], [], {}
    for folder in folders:
        found, source = read_run(folder)
        key = data_key(source)
        if key in seen:
            raise UserError(f"{folder}: the same data as {seen[key]}")
        seen[key] = folder
        sources.append(source)
        records += [record | {"question": f"{folder.name} {record['question']}"} for record in found]
    return records, sources


def table(summary: Summary) -> str:
    """The figures as a Markdown table, the full memory first."""

    def cell(value: Value) -> str:
        if value.low is None:
            return f"{value.value:.1f}"
        return f"{value.value:.3f} [{value.low:.3f}, {value.high:.3f}]"

    lines = [
        "| arm | accuracy | compressions | fired | peak rows | mean rows | new tokens |",
        "|---|---|---|---|---|---|---|",
    ]
    for arm, values in {FULL: summary.metrics, **summary.arms}.items():
        rest = " | ".join(f"{values[name].value:.{2 if name == 'fired' else 1}f}" for name in COLUMNS[1:])
        lines.append(f"| {arm} | {cell(values['accuracy'])} | {rest} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Pool, print the table, write JSON and picture."""
    args = parse(__doc__, argv)
    try:
        records, sources = pooled(args.runs)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    summary = summarize(records, 42)
    write_json(args.out, {"n": len(records), **summary.as_dict(), "runs": sources})
    if args.png is not None:
        with atomic(args.png) as temporary:
            accuracy_by_budget(summary).savefig(temporary, format="png", dpi=150)
    print(table(summary))
    return 0


if __name__ == "__main__":
    sys.exit(main())
