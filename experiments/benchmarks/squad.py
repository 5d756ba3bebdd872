"""Compressed passages beside the full text: reading, answering, memory, and when the compressor's cost is paid back.

    python -m experiments.benchmarks.squad --out experiments/results/squad_cpu.json
    python -m experiments.benchmarks.squad --shape llama8b --device cuda --out experiments/results/squad_gpu.json

`serving`, by batch and length of the passage (a passage for each row), at one slot for `--ratio` tokens, arms:

* `read_full`: head and passage into a KV cache; `read_slots`: head and slots
* `compress_NAME`: source states and compressor; contextual states, or `NAME_embeddings`
* `read_anchors`, `read_gist`: the passage is read and all but some rows of KV is dropped
* `first_X`, `answer_X`: question and first token, or `--new_tokens`, after what `full`, `slots`, `anchors`, `gist` left

`kv_bytes` are those of the whole batch, really held after reading (`kvc.cache.accounting`). `seconds_per_token` is a
decode step of the batch. Weights are random and adapters merged; lengths, not words, decide the time.

`break_even`: questions on one passage from which a compressor takes no longer than the full text. `kept`: what was read
stays in memory between questions, in either case. `reread`: keys and values do not stay; the text is read again for
each question, or the slots are, which were stored; anchors and gist rows are keys and values and stay. `length`: tokens
of a passage from which it pays at so many questions. null is never, as far as measured.

`training`: forward and backward of a step of `ContextCompressor` (LoRA on all linear layers, distillation and teacher
forcing; `full_text` is the control), without the optimizer; on a GPU with gradient checkpointing, where anchors allow
it, and one model after the other. Tokens are those of the text, answer included.

Arms run in turn; medians over rounds, ratios of medians, intervals that resample rounds. On a shared machine the
processor seconds say more than the wall clock. Peak memory is that of one run beyond model and input: on a CPU of a
process of its own, on a GPU what was allocated.
"""

import argparse
import gc
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from experiments.benchmarks.decode import device_name
from experiments.benchmarks.meters import Arm, in_child
from experiments.benchmarks.rounds import UNITS, Medians, described, medians, peaks, run
from experiments.benchmarks.squad_models import SHAPES, TRAINED, WAYS, Sizes
from experiments.benchmarks.squad_serving import figures, lengths_that_pay, serving
from experiments.benchmarks.squad_training import training, weights
from kvc.core.files import write_json
from kvc.errors import UserError
from kvc.runs import provenance


def measure_serving(options: argparse.Namespace, device: str) -> dict[str, Any]:
    """Every case, and from which length on compressing pays."""
    cases, lengths = [], []
    for batch in options.batches:
        timed: dict[str, list[tuple[int, Medians]]] = {unit: [] for unit in UNITS}
        for context in sorted(options.contexts):
            sizes = sizes_of(options, batch, context)
            arms, memories = serving(sizes, options.compressors, device)
            found = run(arms, options.rounds, device)
            held = {name: memory.bytes for name, memory in memories.items()}
            case: dict[str, Any] = {
                "batch": batch,
                "context": context,
                "rows": {name: float(memory.tokens[0]) for name, memory in memories.items()},
                "kv_bytes": held,
                "kv_share": {name: round(size / held["full"], 4) for name, size in held.items()},
            }
            for unit in UNITS:
                timed[unit].append((context, medians(found, unit)))
                case[unit] = figures(timed[unit][-1][1], options.compressors, sizes)
            memories.clear()
            case["peak_mib"] = peak_mib("serving", sizes, options.compressors, device, arms)
            del arms
            release(device)
            print(case, flush=True)
            cases.append(case)
        for unit, each in timed.items():
            pays = lengths_that_pay(each, options.compressors, options.questions)
            lengths.append({"batch": batch, "unit": unit, "length": pays})
    return {"cases": cases, "break_even": lengths}


def groups(options: argparse.Namespace, device: str) -> Iterator[list[str]]:
    """Methods that are in memory at once."""
    yield from [[name] for name in options.trained] if device == "cuda" else [options.trained]


def release(device: str) -> None:
    """Free what is left of a model before the next one is made, where memory is short."""
    if device == "cuda":
        gc.collect()


def measure_training(options: argparse.Namespace, device: str) -> list[dict[str, Any]]:
    """Steps of each method; ratios to the first one."""
    sizes = sizes_of(options, options.train_batch, options.train_context)
    count = sizes.batch * (sizes.head + sizes.context + sizes.tail + sizes.answer)
    cases = []
    for names in groups(options, device):
        arms = training(sizes, names, device)
        about = {name: weights(arm.args[0]) for name, arm in arms.items()}  # type: ignore[attr-defined]
        found = run(arms, options.rounds, device)
        peak = peak_mib("training", sizes, names, device, arms)
        times = {unit: medians(found, unit) for unit in UNITS}
        for name in names:
            case: dict[str, Any] = {"method": name, "tokens": count, **about[name], "peak_mib": peak[name]}
            for unit, each in times.items():
                case[unit] = {"seconds": described(each[name]), "tokens_per_second": described(count / each[name])}
                if name != names[0]:
                    case[unit][f"ratio_to_{names[0]}"] = described(each[name] / each[names[0]])
            print(case, flush=True)
            cases.append(case)
        # The next model may not fit beside it.
        del arms
        release(device)
    return cases


def peak_mib(part: str, sizes: Sizes, names: list[str], device: str, arms: dict[str, Arm]) -> dict[str, float]:
    """Memory that one run of each arm needs, MiB."""
    found = peaks(arms, device) if device == "cuda" else _in_child(part, sizes, names)
    return {name: round(size / 2**20, 2) for name, size in found.items()}


def _in_child(part: str, sizes: Sizes, names: list[str]) -> dict[str, int]:
    found: dict[str, int] = in_child(_peaks_on_cpu, part, sizes, names, give_back=True)
    return found


def _peaks_on_cpu(part: str, sizes: Sizes, names: list[str]) -> dict[str, int]:
    return peaks(serving(sizes, names, "cpu").arms if part == "serving" else training(sizes, names, "cpu"), "cpu")


def sizes_of(options: argparse.Namespace, batch: int, context: int) -> Sizes:
    """Sizes of one case."""
    return Sizes(
        options.shape,
        batch,
        context,
        options.head,
        options.tail,
        options.new_tokens,
        options.ratio,
        options.max_length,
    )


PARTS: dict[str, Callable[[argparse.Namespace, str], Any]] = {"serving": measure_serving, "training": measure_training}


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--parts", choices=tuple(PARTS), nargs="+", default=list(PARTS))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, help="processor threads; the machine's number by default")
    parser.add_argument("--shape", choices=tuple(SHAPES), default="tiny", help="llama8b only on a GPU")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--contexts", type=int, nargs="+", default=[128, 512, 2048], help="tokens of a passage")
    parser.add_argument("--ratio", type=float, default=8.0, help="tokens of a slot")
    parser.add_argument(
        "--compressors",
        choices=WAYS,
        nargs="+",
        default=["mean_pool", "mean_pool_embeddings", "cross_attention_embeddings", "anchors", "gist"],
    )
    parser.add_argument("--questions", type=int, nargs="+", default=[1, 4, 16, 64], help="on one passage")
    parser.add_argument("--head", type=int, default=4, help="tokens before the passage")
    parser.add_argument("--tail", type=int, default=24, help="tokens of a question")
    parser.add_argument("--new_tokens", type=int, default=16, help="of an answer")
    parser.add_argument("--max_length", type=int, default=512, help="tokens that are compressed at once")
    parser.add_argument("--trained", choices=TRAINED, nargs="+", default=["full_text", "mean_pool", "cross_attention"])
    parser.add_argument("--train_batch", type=int, default=8)
    parser.add_argument("--train_context", type=int, default=512)
    return parser


def main(words: list[str] | None = None) -> None:
    """Measure, and write the figures after every part."""
    options = arguments().parse_args(words)
    device = options.device
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device: there is no CUDA device")
    if device == "cpu" and options.shape == "llama8b":
        raise UserError("--shape: llama8b needs --device cuda")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    settings = {name: value for name, value in vars(options).items() if name not in ("out", "parts", "device")}
    result: dict[str, Any] = {
        "what": "median seconds and ratios of interleaved runs; see experiments/benchmarks/squad.py",
        "settings": {**settings, "dtype": "bfloat16" if device == "cuda" else "float32"},
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg(),
        **provenance(),
    }
    for part in options.parts:
        start = time.perf_counter()
        result[part] = PARTS[part](options, device)
        result[f"{part}_took_seconds"] = round(time.perf_counter() - start, 1)
        write_json(options.out, result)
    print(f"-> {options.out}")


if __name__ == "__main__":
    main()
