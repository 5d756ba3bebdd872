"""What one R-KV trigger costs: redundancy by an L x L matrix, tile by tile, and with projected keys.

    python -m experiments.benchmarks.rkv_scoring --out experiments/results/rkv_scoring_cpu.json

One layer, 8 KV heads of 128, on Gaussian keys (hardly a pair is similar) and clustered ones (about 12 keys per centre).
The arms run in turn; medians over the rounds and their ratios are reported. Where the matrix of all heads does not fit
into memory, the literal form runs head by head; where that of one head does not fit, it is skipped, and a note says so.
Peak memory is what each arm needs beyond its input, on a CPU by a process of its own per arm.
On a shared CPU the wall clock tells of the neighbours too, so processor seconds of the same runs stand beside it.
"""

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from experiments.benchmarks.meters import in_child, peak_of, timed
from kvc.core.files import write_json
from kvc.eviction.importance import past_importance
from kvc.eviction.redundancy import redundancy
from kvc.runs import provenance

KV_HEADS, WIDTH, GROUP, WINDOW = 8, 128, 4, 8
PROJECTION = 64
THRESHOLD = 0.5
UNITS = ("wall", "processor")


def make_keys(kind: str, length: int, device: str) -> torch.Tensor:
    """`[1, KV_HEADS, length, WIDTH]`."""
    draw = torch.Generator().manual_seed(length)
    noise = torch.randn(1, KV_HEADS, length, WIDTH, generator=draw)
    if kind == "clustered":
        centres = torch.randn(1, KV_HEADS, length // 12, WIDTH, generator=draw)
        which = torch.randint(length // 12, (1, KV_HEADS, length, 1), generator=draw)
        noise = centres.gather(2, which.expand_as(noise)) + 0.5 * noise
    return noise.to(device)


def literal(keys: torch.Tensor) -> torch.Tensor:
    """The formula as it is written, all heads at once: cosines, threshold, newest index, zeroing, mean, softmax."""
    unit = keys / (keys.norm(dim=-1, keepdim=True) + 1e-8)
    cosine = unit @ unit.transpose(-1, -2)
    cosine.diagonal(dim1=-2, dim2=-1).zero_()
    index = torch.arange(cosine.shape[-1], device=keys.device)
    newest = torch.where(cosine > THRESHOLD, index, torch.zeros_like(index)).amax(-1, keepdim=True)
    return cosine.scatter_(-1, newest, 0).mean(-2).softmax(-1)


def literal_by_head(keys: torch.Tensor) -> torch.Tensor:
    """The same, one matrix at a time."""
    return torch.cat([literal(keys[:, head : head + 1]) for head in range(keys.shape[1])], 1)


def exact(keys: torch.Tensor) -> torch.Tensor:
    """Tile by tile."""
    return redundancy(keys)


def projected(keys: torch.Tensor) -> torch.Tensor:
    """Tile by tile, neighbours among projected keys."""
    return redundancy(keys, projection=PROJECTION)


def importance(keys: torch.Tensor) -> torch.Tensor:
    """The other half of the score, for scale."""
    queries = keys[:, :, -WINDOW:].repeat_interleave(GROUP, 1)
    return past_importance(queries, keys, WINDOW, 7)


ARMS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "literal": literal,
    "literal_by_head": literal_by_head,
    "exact": exact,
    "projected": projected,
    "importance": importance,
}


def available_bytes(device: str) -> int:
    """Memory that is free now."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))


def arms_that_fit(length: int, device: str) -> tuple[list[str], str | None]:
    """Arms to run at a length, and a note on those that are not."""
    # Cosines in float32, indices in int64, a mask: 13 bytes a pair.
    one_head, free = 13 * length**2, 0.8 * available_bytes(device)
    if KV_HEADS * one_head <= free:
        return ["literal", "exact", "projected", "importance"], None
    gib = f"{KV_HEADS * one_head / 2**30:.0f} GiB"
    if one_head <= free:
        note = f"all heads at once would need {gib}: the literal form runs head by head"
        return ["literal_by_head", "exact", "projected", "importance"], note
    return ["exact", "projected", "importance"], f"skipped: the literal form would need {gib}"


def _peak_on_cpu(arm: str, kind: str, length: int) -> int:
    keys = make_keys(kind, length, "cpu")
    ARMS[arm](make_keys(kind, 64, "cpu"))
    return peak_of(lambda: ARMS[arm](keys), "cpu")


def peak_bytes(arm: str, kind: str, length: int, device: str) -> int:
    """Memory that one call needs beyond its input."""
    if device == "cuda":
        keys = make_keys(kind, length, device)
        return peak_of(lambda: ARMS[arm](keys), device)
    return int(in_child(_peak_on_cpu, arm, kind, length))


def measure(kind: str, length: int, rounds: int, device: str) -> dict[str, Any]:
    """All arms at one length on one kind of keys."""
    keys = make_keys(kind, length, device)
    arms, note = arms_that_fit(length, device)
    for arm in arms:
        ARMS[arm](keys[:, :, :1024])
    runs = [{arm: timed(lambda arm=arm: ARMS[arm](keys), device) for arm in arms} for _ in range(rounds)]
    medians = {unit: {arm: statistics.median(run[arm][unit] for run in runs) for arm in arms} for unit in UNITS}
    result: dict[str, Any] = {
        "keys": kind,
        "length": length,
        "median_seconds": {unit: {arm: round(t, 5) for arm, t in medians[unit].items()} for unit in UNITS},
        "runs": [{arm: {u: round(t, 5) for u, t in times.items()} for arm, times in run.items()} for run in runs],
        "peak_mib": {
            arm: round(peak_bytes(arm, kind, length, device) / 2**20, 1) for arm in arms if arm != "importance"
        },
    }
    if note is not None:
        result["note"] = note
    if arms[0].startswith("literal"):
        base = arms[0]
        result["speed_up"] = {
            unit: {arm: round(medians[unit][base] / medians[unit][arm], 2) for arm in ("exact", "projected")}
            for unit in UNITS
        }
        truth = ARMS[base](keys)
        result["largest_relative_error"] = {
            arm: float(((ARMS[arm](keys) - truth) / truth).abs().max()) for arm in ("exact", "projected")
        }
    return result


def main() -> None:
    """Measure and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 16384])
    parser.add_argument("--keys", choices=("gauss", "clustered"), nargs="+", default=["gauss", "clustered"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=None, help="processor threads; the machine's number by default")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    cases = []
    with torch.no_grad():
        for length in options.lengths:
            for kind in options.keys:
                cases.append(measure(kind, length, options.rounds, device))
                print(
                    {name: cases[-1].get(name) for name in ("keys", "length", "median_seconds", "speed_up")}, flush=True
                )
    processor = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    result = {
        "what": "seconds to score redundancy once in one layer; speed_up = literal / arm, medians of interleaved runs",
        "shape": {"rows": 1, "kv_heads": KV_HEADS, "head_dim": WIDTH, "dtype": "float32", "projection": PROJECTION},
        "device": torch.cuda.get_device_name() if device == "cuda" else processor[0].split(":")[1].strip(),
        "threads": torch.get_num_threads(),
        "rounds": options.rounds,
        "cases": cases,
        **provenance(),
    }
    write_json(options.out, result)
    print(f"-> {options.out}")


if __name__ == "__main__":
    main()
