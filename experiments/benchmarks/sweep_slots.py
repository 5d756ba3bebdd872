"""Does a second slot pay? Wall time of the same sweep on one slot and on two.

    python -m experiments.benchmarks.sweep_slots --out experiments/results/sweep_slots.json

Each round runs every arm once, from an empty folder; the order alternates. Hidden states are on disk before the first.
A sweep on N CPU slots gives each cell a share of the cores, so the arms use the same cores.
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

from kvc.core.files import write_json
from kvc.runs import provenance

GRID = Path(__file__).resolve().parents[1] / "sweep_tiny.yaml"
DONE = re.compile(r" (\S+) done after (\d+):(\d+):(\d+)")


def sweep(grid: Path, slots: int, root: Path, only: str, cache: Path) -> dict[str, Any]:
    """One sweep; its wall time and the seconds of its cells."""
    words = [sys.executable, "-m", "kvc", "sweep", str(grid), "--slots", f"cpu:{slots}", "--root", str(root)]
    env = {**os.environ, "KVC_CACHE": str(cache)}
    begun = time.perf_counter()
    subprocess.run([*words, "--only", only], env=env, check=True, stdout=subprocess.DEVNULL)
    wall = time.perf_counter() - begun
    history = (root / ".sweep" / "sweep.log").read_text(encoding="utf-8")
    cells = {name: 3600 * int(h) + 60 * int(m) + int(s) for name, h, m, s in DONE.findall(history)}
    return {"wall": round(wall, 1), "cells": len(cells), "median_cell": statistics.median(cells.values())}


def main() -> None:
    """Run all rounds and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--grid", type=Path, default=GRID)
    parser.add_argument("--only", default="train/*", help="cells; what they need runs as well")
    parser.add_argument("--slots", type=int, nargs=2, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=1)
    options = parser.parse_args()
    rounds: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        sweep(options.grid, 1, place / "warm", "baseline", place / "cache")
        for number in range(options.rounds):
            arms = {}
            for slots in options.slots if number % 2 == 0 else options.slots[::-1]:
                arms[f"slots_{slots}"] = sweep(
                    options.grid, slots, place / f"{number}-{slots}", options.only, place / "cache"
                )
            rounds.append({**arms, "load": os.getloadavg()[0]})
            print(rounds[-1], flush=True)
    one, other = (f"slots_{slots}" for slots in options.slots)
    ratio = statistics.median(r[other]["wall"] / r[one]["wall"] for r in rounds)
    result = {
        "what": f"seconds of wall clock of one sweep; ratio is the median over rounds of ({other} / {one})",
        "grid": options.grid.name,
        "only": options.only,
        "rounds": rounds,
        "ratio": round(ratio, 3),
        **provenance(),
    }
    write_json(options.out, result)
    print(f"{other} takes {ratio:.2f} of the time of {one} -> {options.out}")


if __name__ == "__main__":
    main()
