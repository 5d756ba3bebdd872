"""The training log of the tiny model, from its run folder: what, where, how long, and the curves.

python -m experiments.tiny_lm_log runs/tiny-lm --out data/tiny-lm/training_log.json \
    --png experiments/results/tiny_lm_curves.png
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from kvc.core.files import atomic, write_json
from kvc.errors import UserError
from kvc.runs import RunFolder

COMMAND = "python -m kvc fit --config configs/lm/tiny.yaml --name tiny-lm"
CURVES = ("train/loss", "train/result_accuracy", "val/loss", "perf/steps_per_second", "perf/peak_mib")
KEPT = ("seed", "machine", "versions", "timing")


def curves(folder: Path) -> dict[str, list[list[float]]]:
    """Name to rows of (step, seconds since the first, value)."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    result = {}
    for tag in [tag for tag in events.Tags()["scalars"] if tag in CURVES]:
        points = events.Scalars(tag)
        result[tag] = [[p.step, round(p.wall_time - points[0].wall_time), round(p.value, 4)] for p in points]
    return result


def draw(scalars: dict[str, list[list[float]]]) -> Figure:
    """Loss, accuracy on answers and exact match of held-out items over the training steps."""
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for tag, points in scalars.items():
        steps, values = [p[0] for p in points], [p[2] for p in points]
        if tag.endswith("loss"):
            left.plot(steps, values, label=tag)
        elif "accuracy" in tag:
            right.plot(steps, values, label=tag)
    left.set(xlabel="step", ylabel="loss (nats per weighted token)", yscale="log")
    right.set(xlabel="step", ylabel="accuracy on numbers and answers", ylim=(0, 1.02))
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
    return figure


def main(argv: list[str]) -> int:
    """Write the log and the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="JSON to write")
    parser.add_argument("--png", type=Path, required=True, help="picture to write")
    arguments = parser.parse_args(argv)
    result: dict[str, Any] = RunFolder(arguments.run).read_result()
    scalars = curves(arguments.run)
    log = {"command": COMMAND, **{key: result[key] for key in KEPT if key in result}, "curves": scalars}
    write_json(arguments.out, log)
    with atomic(arguments.png) as temporary:
        draw(scalars).savefig(temporary, dpi=120, format="png")
    print(f"wrote {arguments.out} and {arguments.png}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
