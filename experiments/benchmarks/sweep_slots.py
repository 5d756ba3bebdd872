"""Does a second slot pay? Wall time of the same sweep on one slot and on two.

    python -m experiments.benchmarks.sweep_slots --out experiments/results/sweep_slots.json

The cells are short fits of the COMP classifier on a small model with random weights. Each round runs every arm once,
from an empty folder; the order alternates. Hidden states are on disk before the first. A sweep on N CPU slots gives
each cell a share of the cores, so all arms use the same cores.
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

from kvc.core.files import write_json
from kvc.runs import provenance

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "comp" / "tiny.yaml"
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
DONE = re.compile(r" (\S+) done after (\d+):(\d+):(\d+)")


def write_grid(path: Path, cells: int) -> Path:
    """A grid of short fits that differ in the learning rate."""
    grid = {
        "base": os.path.relpath(CONFIG, path.parent),
        "set": {
            "trainer.max_epochs": 3,
            "data.init_args.counts": [160, 40, 40],
            "model.init_args.backbone": {"pretrained": "tiny", "from_config": True, "overrides": SMALL},
        },
        "axes": {"model.init_args.optim.lr": [round(0.001 * (number + 1), 3) for number in range(cells)]},
    }
    path.write_text(yaml.safe_dump(grid), encoding="utf-8")
    return path


def sweep(grid: Path, slots: int, root: Path, cache: Path, *options: str) -> dict[str, Any]:
    """One sweep; its wall time and the seconds of its cells."""
    words = [sys.executable, "-m", "kvc", "sweep", str(grid), "--slots", f"cpu:{slots}", "--root", str(root)]
    env = {**os.environ, "KVC_CACHE": str(cache)}
    begun = time.perf_counter()
    subprocess.run([*words, *options], env=env, check=True, stdout=subprocess.DEVNULL)
    wall = time.perf_counter() - begun
    history = (root / ".sweep" / "sweep.log").read_text(encoding="utf-8")
    cells = {name: 3600 * int(h) + 60 * int(m) + int(s) for name, h, m, s in DONE.findall(history)}
    return {"wall": round(wall, 1), "cells": len(cells), "median_cell": statistics.median(cells.values())}


def main() -> None:
    """Run all rounds and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cells", type=int, default=12)
    parser.add_argument("--slots", type=int, nargs=2, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=1)
    options = parser.parse_args()
    rounds: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        grid = write_grid(place / "slots.yaml", options.cells)
        sweep(grid, 1, place / "warm", place / "cache", "--only", "lr=0.001")
        for number in range(options.rounds):
            arms = {}
            for slots in options.slots if number % 2 == 0 else options.slots[::-1]:
                arms[f"slots_{slots}"] = sweep(grid, slots, place / f"{number}-{slots}", place / "cache")
            rounds.append({**arms, "load": os.getloadavg()[0]})
            print(rounds[-1], flush=True)
    one, other = (f"slots_{slots}" for slots in options.slots)
    ratio = statistics.median(r[other]["wall"] / r[one]["wall"] for r in rounds)
    result = {
        "what": f"seconds of wall clock of one sweep; ratio is the median over rounds of ({other} / {one})",
        "cells": options.cells,
        "rounds": rounds,
        "ratio": round(ratio, 3),
        **provenance(),
    }
    write_json(options.out, result)
    print(f"{other} takes {ratio:.2f} of the time of {one} -> {options.out}")


if __name__ == "__main__":
    main()
