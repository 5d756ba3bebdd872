"""Decoding speed and KV memory: our loop beside `model.generate` with full KV and, if it is installed, kvpress.

    python -m experiments.benchmarks.decode --out FILE.json [--kvpress_python ENV/bin/python] [--grid full]

Two parts. `grid`: batch x length of the prompt, sides `hf_full` (`model.generate`, DynamicCache), `kvc_full` (our loop,
nothing evicted), `kvc_POLICY` (our loop within a budget), and from the other environment `kvpress_none` (its
`model.generate`, full KV) and `kvpress_PRESS` (DecodingPress). `overhead`: what our loop costs when nothing is evicted,
alone and with an R-KV eviction that records queries and never reaches its budget, beside `model.generate`.

The sides run in turn, each round beginning with another; medians over rounds, ratios to `hf_full` of the same round.
All sides start from the same prompt, read once, and compress every `interval` tokens; the clock starts after the first
compression (see `kvpress_worker`, which does the measuring on both sides). Bytes are those of the whole batch: distinct
storages of the cache, when attention reads it; `aside_bytes_peak` is what is kept beside it to score with (queries, or
hidden states). On a shared machine the processor seconds say more than the wall clock.

`bytes_per_step` is what a decode step must read: weights without an input embedding of its own, and
batch x rows x 2 x layers x KV heads x head width, in bytes of the dtype. On CUDA `roofline_share` is this over the
measured time, as a share of the bandwidth of a large copy on the same device (or of `--bandwidth`).
"""

import argparse
import copy
import gc
import json
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from experiments.benchmarks.kvpress_worker import Cell, Plain, Prefix, measure, run
from experiments.benchmarks.rkv_scoring import available_bytes
from kvc.cache.memory import KVMemory
from kvc.core.backbone import Backbone
from kvc.core.files import write_json
from kvc.core.seeds import DEFAULT_SEED
from kvc.errors import UserError
from kvc.eviction.eviction import Eviction
from kvc.eviction.registry import make_policy
from kvc.eviction.triggers import EveryTokens
from kvc.generation.decode import generate
from kvc.generation.protocols import Compressor
from kvc.runs import provenance

SHAPES: dict[str, dict[str, Any] | None] = {
    "tiny": None,
    "small": {
        "vocab_size": 8192,
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": 32768,
    },
    "llama8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 131072,
    },
}
"""Fields of a Llama with random weights; None is the shipped tiny model."""

GRIDS: dict[str, dict[str, tuple[list[int], list[int]]]] = {
    "small": {"tiny": ([1, 16], [1024]), "small": ([1, 4], [2048]), "llama8b": ([1, 8], [2048, 8192])},
    "full": {
        "tiny": ([1, 16], [512, 1024, 3072]),
        "small": ([1, 4, 16], [1024, 4096, 8192]),
        "llama8b": ([1, 8, 64], [2048, 8192, 32000]),
    },
}
"""Batches and lengths of each shape."""
SIZES = {"small": (256, 32), "full": (512, 128)}
"""Budget and interval."""
POLICIES = ("rkv", "snapkv", "tova", "knorm", "streaming_llm")
PRESSES = ("none", "snapkv", "tova", "knorm", "streaming_llm")
COPIES = {"cpu": {"cpu": 5}, "cuda": {"cpu": 2, "cuda": 2}}
"""Full caches that a device needs in each memory: stored prompts, here and in the other process, and what grows."""

Arm = Callable[[bool], dict[str, Any]]


class Loop(Plain):
    """Our decode loop.

    Args:
        model: The model, with hooks of its own: not the one that `model.generate` is timed on.
        compressor: Makes a compressor for a cell; None evicts nothing.
    """

    def __init__(self, model: LlamaForCausalLM, compressor: Callable[[Cell], Compressor] | None = None) -> None:
        super().__init__(model)
        self._compressor = compressor

    def cache(self, prefix: Prefix) -> KVMemory:
        """A memory of its own that holds the prefix."""
        memory, device = KVMemory(self.model), self.model.device
        for layer, (keys, values) in enumerate(prefix.rows):
            positions = torch.arange(keys.shape[2], device=device).expand(keys.shape[0], -1)
            memory.append(layer, keys.to(device, copy=True), values.to(device, copy=True), positions)
        return memory

    def decode(self, prefix: Prefix, cache: KVMemory, cell: Cell) -> list[list[int]]:
        """New tokens of each row."""
        compressor = self._compressor(cell) if self._compressor is not None else None
        new = cell.lead + cell.new
        ids = prefix.ids[:, -1:]
        return generate(
            self.model, ids, memory=cache, compressor=compressor, max_new_tokens=new, eos_token_id=()
        ).tokens

    def aside(self, arguments: dict[str, Any]) -> list[torch.Tensor]:
        """Recorded queries."""
        tap = arguments.get("kvc_tap")
        kept = [tap.queries(layer) for layer in range(len(self.model.model.layers))] if tap is not None else []
        return [queries for queries in kept if queries is not None]


class Kvpress:
    """The other process.

    Args:
        python: Interpreter of its environment.
        settings: See `kvpress_worker`.
        folder: For its settings and messages.
    """

    def __init__(self, python: str, settings: dict[str, Any], folder: Path) -> None:
        self._messages = folder / "kvpress.log"
        (folder / "settings.json").write_text(json.dumps(settings), encoding="utf-8")
        script = Path(__file__).with_name("kvpress_worker.py")
        # Isolated, or PYTHONPATH and the folder of the script would shadow packages of the other environment.
        words = [python, "-I", str(script), str(folder / "settings.json"), "--serve"]
        with self._messages.open("w", encoding="utf-8") as log:
            try:
                self._process = subprocess.Popen(
                    words,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                    env={**os.environ, "HF_HUB_OFFLINE": "1"},
                )
            except OSError as error:
                raise UserError(f"--kvpress_python: cannot start {python}: {error.strerror}") from error
        self.versions: dict[str, str] = self._read()["versions"]

    def ask(self, side: str, cell: Cell, record: bool) -> dict[str, Any]:
        """One run."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"side": side, "cell": asdict(cell), "record": record}) + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            tail = self._messages.read_text(encoding="utf-8").strip().splitlines()[-1:]
            raise UserError(f"--kvpress_python: the other process has ended: {' '.join(tail) or 'without a message'}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """Let it end."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def build(shape: str, dtype: str, device: str) -> LlamaForCausalLM:
    """The model of a shape, frozen and in eval mode."""
    fields = SHAPES[shape]
    if fields is None:
        model = Backbone(dtype=dtype).load().to(device)  # type: ignore[arg-type]
    else:
        torch.manual_seed(DEFAULT_SEED)
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(LlamaConfig(**fields), dtype=getattr(torch, dtype))
    return model.requires_grad_(False).eval()


def twin(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """The same weights in modules of their own: our hooks must not slow down the model that they are compared with."""
    return copy.deepcopy(model, {id(weight): weight for weight in model.parameters()})


def weight_bytes(model: LlamaForCausalLM) -> int:
    """Bytes of the weights that a decode step reads: all but input embeddings that are not the output's too."""
    weights = {id(weight): weight for weight in model.parameters()}
    if not model.config.tie_word_embeddings:
        weights.pop(id(model.get_input_embeddings().weight))
    return sum(weight.numel() * weight.element_size() for weight in weights.values())


def row_bytes(config: Any, itemsize: int) -> int:
    """Bytes of the keys and values of one token in all layers."""
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * itemsize


def step_bytes(weights: int, row: int, batch: int, rows: float) -> float:
    """Bytes that a decode step must read.

    Args:
        weights: See `weight_bytes`.
        row: See `row_bytes`.
        batch: Rows of the batch.
        rows: Tokens in the memory of each, the mean over layers.
    """
    return weights + batch * rows * row


def copy_bandwidth(device: str) -> float:
    """Bytes a second that a copy of 1 GiB reads and writes: the best of ten."""
    source = torch.empty(2**30, dtype=torch.uint8, device=device)
    target, best = torch.empty_like(source), 0.0
    for _ in range(10):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        target.copy_(source)
        end.record()
        torch.cuda.synchronize()
        best = max(best, 2 * 2**30 / (start.elapsed_time(end) / 1000))
    return best


def add_roofline(result: dict[str, Any], model: LlamaForCausalLM, bandwidth: float | None) -> None:
    """Note for every side of a cell what a step reads, and how much of the bandwidth that is."""
    weights, row = weight_bytes(model), row_bytes(model.config, next(model.parameters()).element_size())
    for side in result["sides"].values():
        if "error" in side:
            continue
        size = step_bytes(weights, row, result["batch"], side["memory"]["mean_rows_timed"])
        side["bytes_per_step"] = round(size)
        side["gigabytes_per_second"] = round(size / (side["seconds"]["wall"] / result["new"]) / 1e9, 3)
        if bandwidth is not None:
            side["roofline_share"] = round(side["gigabytes_per_second"] * 1e9 / bandwidth, 4)


def evicting(policy: str, cell: Cell) -> Eviction:
    """Every `interval` tokens, as DecodingPress does: the prompt is first compressed after the first interval."""
    return Eviction(make_policy(policy), cell.budget, EveryTokens(cell.interval, at_prefill=False))


def unreached(cell: Cell) -> Eviction:
    """R-KV as it comes, with room for everything."""
    return Eviction(make_policy("rkv"), 2 * (cell.length + cell.lead + cell.new))


def grid_sides(model: LlamaForCausalLM) -> dict[str, Plain]:
    """Sides of this process, the reference first."""
    ours = twin(model)
    sides = {"hf_full": Plain(model), "kvc_full": Loop(ours)}
    return sides | {f"kvc_{policy}": Loop(ours, partial(evicting, policy)) for policy in POLICIES}


def overhead_sides(model: LlamaForCausalLM) -> dict[str, Plain]:
    """Sides that evict nothing; recording changes the attention function of a model, so each has a twin of its own."""
    return {"hf_full": Plain(model), "kvc_full": Loop(twin(model)), "kvc_rkv_unreached": Loop(twin(model), unreached)}


def local_arm(side: Plain, prefix: Prefix, cell: Cell) -> Arm:
    """A run in this process; too little device memory is an answer."""

    def arm(record: bool) -> dict[str, Any]:
        try:
            return run(side, prefix, cell, record)
        except torch.OutOfMemoryError:
            return {"error": "out of memory"}
        finally:
            if side.model.device.type == "cuda":
                torch.cuda.empty_cache()  # the other process needs it next

    return arm


def grid_cells(options: argparse.Namespace, shape: str) -> list[Cell]:
    """Cells of a shape: two timed compressions each."""
    batches, lengths = GRIDS[options.grid][shape]
    budget, interval = SIZES[options.grid]
    # kvpress compresses in forward number `interval`, our loop after the next one.
    return [
        Cell(batch, length, interval + 2, 2 * interval, budget, interval)
        for batch in options.batches or batches
        for length in options.lengths or lengths
    ]


def overhead_cells() -> list[Cell]:
    """Batch 1 and 16, a short prompt."""
    return [Cell(batch, 128, lead=4, new=64) for batch in (1, 16)]


def too_large(cell: Cell, row: int, device: str) -> str | None:
    """Why a cell is skipped; None if it fits."""
    full = cell.batch * (cell.length + cell.lead + cell.new) * row
    for memory, copies in COPIES[device].items():
        if copies * full > 0.8 * available_bytes(memory):
            return f"skipped: {copies} caches of {full / 2**30:.1f} GiB do not fit into {memory} memory"
    return None


def measure_shape(
    shape: str, options: argparse.Namespace, tick: Callable[[str], None], report: Callable[[str, dict[str, Any]], None]
) -> dict[str, Any]:
    """All cells of a shape.

    Args:
        shape: Its name.
        options: Of the command line.
        tick: Told before every run.
        report: Gets the name of the part and every finished cell.

    Returns:
        What belongs to the shape as a whole.
    """
    model = build(shape, options.dtype, options.device)
    row = row_bytes(model.config, next(model.parameters()).element_size())
    bandwidth = options.bandwidth and 1e9 * options.bandwidth
    if bandwidth is None and options.device == "cuda":
        bandwidth = copy_bandwidth(options.device)
    facts: dict[str, Any] = {
        "weights": "trained" if SHAPES[shape] is None else "random",
        "config": {key: getattr(model.config, key) for key in SHAPES["small"] or {}},
        "weight_bytes_per_step": weight_bytes(model),
        "bytes_per_token": row,
        "bandwidth": bandwidth and round(bandwidth),
    }
    with other_process(shape, model, options) as other:
        facts["kvpress"] = other.versions if other is not None else None
        for part in options.parts:
            sides = grid_sides(model) if part == "grid" else overhead_sides(model)
            rounds = options.rounds if part == "grid" else options.overhead_rounds
            for cell in grid_cells(options, shape) if part == "grid" else overhead_cells():
                if note := too_large(cell, row, options.device):
                    report(part, {"shape": shape, **asdict(cell), "note": note, "sides": {}})
                    continue
                tick("prefill")
                prefix = Prefix(model, cell)
                arms: dict[str, Arm] = {name: local_arm(side, prefix, cell) for name, side in sides.items()}
                if other is not None and part == "grid":
                    arms |= {f"kvpress_{press}": partial(other.ask, press, cell) for press in PRESSES}
                wanted = {n: arm for n, arm in arms.items() if n in (options.sides or arms) or n == "hf_full"}
                result = {"shape": shape, **measure(wanted, cell, rounds, tick)}
                add_roofline(result, model, bandwidth)
                report(part, result)
    return facts


@contextmanager
def other_process(shape: str, model: LlamaForCausalLM, options: argparse.Namespace) -> Iterator[Kvpress | None]:
    """A kvpress process with the same model: the same weights, where they are small enough to be written."""
    if options.kvpress_python is None or "grid" not in options.parts:
        yield None
        return
    with tempfile.TemporaryDirectory() as folder:
        settings: dict[str, Any] = {key: getattr(options, key) for key in ("dtype", "device")}
        settings["threads"] = torch.get_num_threads()
        if shape == "llama8b":
            settings |= {"config": SHAPES[shape], "seed": DEFAULT_SEED}
        else:
            model.save_pretrained(Path(folder) / "model")
            settings["folder"] = str(Path(folder) / "model")
        other = Kvpress(options.kvpress_python, settings, Path(folder))
        try:
            yield other
        finally:
            other.close()


def line(part: str, result: dict[str, Any]) -> str:
    """One cell, for people; in brackets the ratios of wall clock and processor."""
    where = f"{part} {result['shape']} batch {result['batch']} length {result['length']}:"
    if not result["sides"]:
        return f"{where} {result['note']}"
    figures = []
    for name, side in result["sides"].items():
        good = "error" not in side
        figures.append(
            f"{name} {side['tokens_per_second']:.0f}/s ({side['ratio']['wall']:.3f})" if good else f"{name} -"
        )
    return f"{where} {', '.join(figures)}"


def device_name(device: str) -> str:
    """What it ran on."""
    if device == "cuda":
        return str(torch.cuda.get_device_name())
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), "unknown processor")


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--kvpress_python", help="of an environment with kvpress; without it, no such sides")
    parser.add_argument("--parts", choices=("grid", "overhead"), nargs="+", default=["overhead", "grid"])
    parser.add_argument("--grid", choices=tuple(GRIDS), default="small")
    parser.add_argument("--shape", choices=tuple(SHAPES), nargs="+", default=["tiny", "small"])
    parser.add_argument("--batches", type=int, nargs="+", help="instead of the grid's")
    parser.add_argument("--lengths", type=int, nargs="+", help="instead of the grid's")
    parser.add_argument("--sides", nargs="+", help="only these, and hf_full")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--overhead_rounds", type=int, default=11)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="bfloat16 on cuda, else float32 by default")
    parser.add_argument("--threads", type=int, help="of each process; the machine's number by default")
    parser.add_argument("--bandwidth", type=float, help="of the device in GB/s; measured by a copy by default")
    return parser


def main(words: list[str] | None = None) -> None:
    """Measure, and write the figures after every cell."""
    options = arguments().parse_args(words)
    if "llama8b" in options.shape and options.device != "cuda":
        raise UserError("--shape: llama8b needs --device cuda")
    options.dtype = options.dtype or ("bfloat16" if options.device == "cuda" else "float32")
    logging.disable_progress_bar()
    gc.freeze()  # what was imported stays, and takes longer to look through before each run than some runs take
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    result: dict[str, Any] = {
        "what": "timed decode steps after the first compression: median seconds, ratio to hf_full of the same round",
        "device": device_name(options.device),
        "dtype": options.dtype,
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg(),
        "shapes": {},
        **{part: [] for part in options.parts},
        **provenance(),
    }
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        bar = progress.add_task("", total=sum(cells_of(options, shape) for shape in options.shape))

        def report(part: str, cell: dict[str, Any]) -> None:
            result[part].append(cell)
            write_json(options.out, result)
            print(line(part, cell), flush=True)
            progress.advance(bar)

        for shape in options.shape:
            tick = lambda side, shape=shape: progress.update(bar, description=f"{shape} {side}")  # noqa: E731
            result["shapes"][shape] = measure_shape(shape, options, tick, report)
    write_json(options.out, result)
    print(f"-> {options.out}")


def cells_of(options: argparse.Namespace, shape: str) -> int:
    """How many there are in all parts."""
    return sum(len(grid_cells(options, shape) if part == "grid" else overhead_cells()) for part in options.parts)


if __name__ == "__main__":
    main()
