"""Compressed context memory: training in one forward, masks, decoding, and how well a GPU is used.

    python -m experiments.benchmarks.ccm --out experiments/results/ccm_cpu.json

* `training`: one step (forward and backward) over S segments and a tail, in one forward (`parallel`) and chunk by chunk
  with the backward through the chain (`stepwise`): the same loss.
* `masks`: one whole-sequence forward with a dense mask (SDPA) and with a block mask (FlexAttention), mask included, on
  a GPU the backward too; and the making of either mask alone. `exponent` is the slope of log seconds over log tokens.
  FlexAttention is compiled, and each length has been run before the clock starts. `blocks_skipped` is the share of
  blocks that the block mask leaves out.
* `generation`: tokens a second and bytes of KV, decoding from a context held as it is (`full`) or compressed.
* `mfu` (GPU): training steps of random models of real shapes, as a share of what a large bf16 product reaches on the
  same device. Counted per token: 4 x weights of the matrix products (forward, and backward to activations; frozen
  weights get no gradient, and what checkpointing computes again does not count) and, for each visible pair of tokens,
  12 x layers x heads x head width. Time of the LM head counts, its operations on the tail do not.

Arms run in turn, each round beginning with another; medians over rounds, ratios of medians. On a shared machine the
processor seconds say more than the wall clock. Peak memory is that of one run beyond model and input: on a CPU of a
process of its own, on a GPU what was allocated.
"""

import argparse
import gc
import os
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig

from experiments.benchmarks.decode import device_name
from experiments.benchmarks.meters import Arm, in_child, peak_of, timed
from experiments.benchmarks.rounds import UNITS, run
from kvc.core.backbone import Lora, add_lora
from kvc.core.files import write_json
from kvc.core.masks import Kind, visibility
from kvc.core.seeds import DEFAULT_SEED
from kvc.errors import UserError
from kvc.methods.ccm.parallel import Compressor
from kvc.methods.ccm.recurrent import CompressedMemory
from kvc.methods.ccm.session import Session
from kvc.methods.ccm.tokens import MemoryTokens
from kvc.runs import provenance

SLOTS = 2
_LARGE = {"vocab_size": 128256, "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131072}
SHAPES: dict[str, dict[str, Any]] = {
    "small": {
        "vocab_size": 4096,
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": 65536,
    },
    "layer": {
        "vocab_size": 1024,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 64,
        "max_position_embeddings": 65536,
    },
    "llama1b": {
        **_LARGE,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "head_dim": 64,
        "tie_word_embeddings": True,
    },
    "llama8b": {**_LARGE, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "head_dim": 128},
}
"""Fields of a Llama with random weights."""


def make_compressor(shape: str, kind: Kind, device: str, attention: str = "sdpa", **settings: Any) -> Compressor:
    """A random model with LoRA and memory tokens; bf16 on a GPU."""
    torch.manual_seed(DEFAULT_SEED)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    with torch.device(device):
        config = LlamaConfig(**SHAPES[shape])
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
        model = add_lora(model.requires_grad_(False), Lora(dropout=0.0))
    tokens = MemoryTokens(model.get_input_embeddings(), SLOTS).to(device)
    return Compressor(model, tokens, kind, **settings)


def draw(compressor: Compressor, batch: int, *lengths: int) -> list[torch.Tensor]:
    """Random texts `[B, length]`."""
    generator = torch.Generator().manual_seed(DEFAULT_SEED)
    size = compressor.tokens.vocabulary
    return [torch.randint(size, (batch, n), generator=generator).to(compressor.model.device) for n in lengths]


def joined(compressor: Compressor, chunks: Sequence[torch.Tensor], tail: torch.Tensor) -> torch.Tensor:
    """One sequence with a run of memory tokens after each chunk."""
    run = compressor.tokens.run(len(tail))
    return torch.cat([part for chunk in chunks for part in (chunk, run)] + [tail], dim=1)


# ---------------------------------------------------------------------- clocks


def race(arms: dict[str, Arm], rounds: int, device: str) -> dict[str, Any]:
    """Median seconds of each arm, and their ratios to the first one."""
    names = list(arms)
    runs = run(arms, rounds, device)
    median = {name: {unit: statistics.median(one[name][unit] for one in runs) for unit in UNITS} for name in names}
    ratio = {name: {u: round(median[name][u] / median[names[0]][u], 3) for u in UNITS} for name in names[1:]}
    seconds = {name: {unit: round(value, 5) for unit, value in found.items()} for name, found in median.items()}
    return {"median_seconds": seconds, f"ratio_to_{names[0]}": ratio}


def exponent(lengths: Sequence[int], seconds: Sequence[float]) -> float:
    """Slope of log seconds over log length, by least squares."""
    return round(float(np.polyfit(np.log(lengths), np.log(seconds), 1)[0]), 3)


# ---------------------------------------------------------------------- training


def training_step(compressor: Compressor, form: str, chunks: Sequence[torch.Tensor], tail: torch.Tensor) -> float:
    """Loss of one step on the tail; gradients are there afterwards."""
    compressor.model.zero_grad()
    compressor.tokens.zero_grad()
    device = compressor.model.device.type
    with torch.autocast(device, torch.bfloat16) if device == "cuda" else nullcontext():
        if form == "parallel":
            ids = joined(compressor, chunks, tail)
            hidden = compressor.hidden(ids, torch.ones_like(ids)).last_hidden_state
            logits = compressor.logits(hidden[:, -tail.shape[1] :])
        else:
            memory = CompressedMemory(compressor)
            for chunk in chunks:
                memory.compress(chunk)
            logits = memory.logits(tail)
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tail[:, 1:].flatten())
    loss.backward()
    return float(loss.detach())


def _peak_on_cpu(shape: str, kind: Kind, form: str, batch: int, segments: int, length: int) -> int:
    compressor = make_compressor(shape, kind, "cpu")
    *chunks, tail = draw(compressor, batch, *[length] * (segments + 1))
    training_step(compressor, form, [chunks[0][:, :4]], tail[:, :4])
    return peak_of(lambda: training_step(compressor, form, chunks, tail), "cpu")


def peak_bytes(compressor: Compressor, shape: str, form: str, chunks: list[torch.Tensor], tail: torch.Tensor) -> int:
    """Memory that one step needs beyond model and input."""
    if compressor.model.device.type == "cuda":
        return peak_of(lambda: training_step(compressor, form, chunks, tail), "cuda")
    return int(in_child(_peak_on_cpu, shape, compressor.kind, form, len(tail), len(chunks), tail.shape[1]))


def training(options: argparse.Namespace, device: str) -> list[dict[str, Any]]:
    """Both forms of a training step, by kind and number of segments."""
    cases = []
    for kind in options.kinds:
        compressor = make_compressor(options.shape, kind, device)
        for segments in options.segments:
            *chunks, tail = draw(compressor, options.batch, *[options.chunk] * (segments + 1))
            forms = ("parallel", "stepwise")
            arms = {f: lambda f=f: training_step(compressor, f, chunks, tail) for f in forms}  # noqa: B023
            case = {"kind": kind, "segments": segments, **race(arms, options.rounds, device)}
            case["loss"] = {form: round(arms[form](), 5) for form in forms}
            peaks = {form: peak_bytes(compressor, options.shape, form, chunks, tail) for form in forms}
            case["peak_mib"] = {form: round(peak / 2**20, 1) for form, peak in peaks.items()}
            print(case, flush=True)
            cases.append(case)
    return cases


# ---------------------------------------------------------------------- masks


def masks(options: argparse.Namespace, device: str) -> list[dict[str, Any]]:
    """Dense and block mask by length, and exponents of their cost."""
    cases: list[dict[str, Any]] = []
    for kind in ("concat_recur", "concat"):
        forms = {"dense": "sdpa", "block": "flex_attention"}
        found = []
        for length in options.lengths:
            arms: dict[str, Arm] = {}
            for form, attention in forms.items():
                compressor = make_compressor(options.mask_shape, kind, device, attention)
                runs = length // options.segment - 1
                *chunks, tail = draw(compressor, 1, *[options.segment - SLOTS] * runs, options.segment)
                ids = joined(compressor, chunks, tail)
                arms[form] = lambda compressor=compressor, ids=ids: whole(compressor, ids)
            seen = visibility(compressor.layout(ids, torch.ones_like(ids)), kind)
            arms |= {"dense_mask": seen.dense, "block_mask": partial(seen.block, compiled=ids.is_cuda)}
            skipped = round(float(seen.block().sparsity()) / 100, 3)
            case = {"kind": kind, "length": ids.shape[1], "blocks_skipped": skipped}
            cases.append({**case, **race(arms, options.rounds, device)})
            found.append(cases[-1])
            print(cases[-1], flush=True)
        if len(found) > 1:
            for unit in ("wall", "processor"):
                slopes = {
                    arm: exponent(options.lengths, [case["median_seconds"][arm][unit] for case in found])
                    for arm in found[0]["median_seconds"]
                }
                found[-1].setdefault("exponent", {})[unit] = slopes
    return cases


def whole(compressor: Compressor, ids: torch.Tensor) -> None:
    """One forward over a sequence, on a GPU with its backward."""
    if not ids.is_cuda:
        with torch.no_grad():
            compressor.hidden(ids, torch.ones_like(ids))
        return
    compressor.model.zero_grad()
    compressor.tokens.zero_grad()
    with torch.autocast("cuda", torch.bfloat16):
        hidden = compressor.hidden(ids, torch.ones_like(ids)).last_hidden_state
    hidden.float().square().mean().backward()


# ---------------------------------------------------------------------- generation


def generation(options: argparse.Namespace, device: str) -> list[dict[str, Any]]:
    """Tokens a second and bytes, by length of the context."""
    cases = []
    kinds: dict[str, Kind] = {"full": "concat_recur", "concat": "concat_recur", "merge": "merge_recur"}
    for context in options.contexts:
        sessions = {}
        for name, kind in kinds.items():
            compressor = make_compressor(options.shape, kind, device)
            compressor.model.eval()
            text, query = draw(compressor, options.batch, context, 16)
            sessions[name] = session = Session(compressor)
            for chunk in text.split(options.chunk, dim=1):
                (session.keep if name == "full" else session.compress)(chunk.tolist())
        settings = {"max_new_tokens": options.new_tokens, "eos_token_id": ()}
        outputs = {name: session.generate(query.tolist(), **settings) for name, session in sessions.items()}
        seconds: dict[str, list[float]] = {name: [] for name in sessions}
        for turn in range(options.rounds):
            names = list(sessions)
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                seconds[name].append(sessions[name].generate(query.tolist(), **settings).decode_seconds)
        steps = options.batch * (options.new_tokens - 1)
        speed = {name: steps / statistics.median(found) for name, found in seconds.items()}
        case = {
            "context": context,
            "tokens_per_second": {name: round(value, 1) for name, value in speed.items()},
            "speed_up": {name: round(value / speed["full"], 3) for name, value in speed.items()},
            "rows": {name: int(session.tokens[0]) for name, session in sessions.items()},
            "memory_bytes": {name: session.bytes for name, session in sessions.items()},
            "peak_bytes_while_decoding": {
                name: round(options.batch * output.usage.summary(0)["kv_bytes_peak"])
                for name, output in outputs.items()
            },
        }
        print(case, flush=True)
        cases.append(case)
    return cases


# ---------------------------------------------------------------------- use of a GPU


def product_speed(device: str, size: int = 8192) -> float:
    """Floating point operations a second of a large product: the best of ten."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / min(timed(lambda: a @ b, device)["wall"] for _ in range(11))


def step_operations(compressor: Compressor, ids: torch.Tensor) -> float:
    """Floating point operations of a training step with frozen weights; see the top of the file."""
    config: Any = compressor.model.config
    names = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    weights = sum(
        parameter.numel()
        for name, parameter in compressor.model.named_parameters()
        if any(part in name for part in names) and ".lora_" not in name
    )
    layout = compressor.layout(ids, torch.ones_like(ids))
    pairs = int(visibility(layout, compressor.kind).dense().sum())
    width = config.num_attention_heads * config.head_dim
    return 4.0 * weights * ids.numel() + 12.0 * config.num_hidden_layers * width * pairs


def mfu(options: argparse.Namespace, device: str) -> list[dict[str, Any]]:
    """Share of the device's speed that training steps reach."""
    speed = options.peak_tflops * 1e12 if options.peak_tflops else product_speed(device, options.product)
    cases = []
    for shape in options.mfu_shapes:
        for attention in options.mfu_attention:
            compressor = make_compressor(shape, "concat_recur", device, attention)
            compressor.model.train()
            compressor.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            *chunks, tail = draw(compressor, options.batch, *[options.mfu_chunk] * options.mfu_segments)
            ids = joined(compressor, chunks, tail)
            step = lambda c=compressor, chunks=chunks, tail=tail: training_step(c, "parallel", chunks, tail)  # noqa: E731
            seconds = race({attention: step}, options.rounds, device)["median_seconds"][attention]["wall"]
            reached = step_operations(compressor, ids) / seconds
            case = {
                "shape": shape,
                "attention": attention,
                "tokens": ids.numel(),
                "seconds": seconds,
                "tokens_per_second": round(ids.numel() / seconds, 1),
                "tflops": round(reached / 1e12, 4),
                "device_tflops": round(speed / 1e12, 4),
                "mfu": round(reached / speed, 4),
            }
            print(case, flush=True)
            cases.append(case)
            # The next model would not fit beside it.
            del compressor, step
            gc.collect()
    return cases


PARTS: dict[str, Callable[[argparse.Namespace, str], list[dict[str, Any]]]] = {
    "training": training,
    "masks": masks,
    "generation": generation,
    "mfu": mfu,
}


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--parts", choices=tuple(PARTS), nargs="+", help="all that the device can do by default")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, help="processor threads; the machine's number by default")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--shape", choices=tuple(SHAPES), default="small", help="of training and generation")
    parser.add_argument("--chunk", type=int, default=128, help="tokens of a segment in training and generation")
    parser.add_argument("--kinds", nargs="+", default=["concat_recur", "merge_recur"], help="in training")
    parser.add_argument("--segments", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--mask_shape", choices=tuple(SHAPES), default="layer")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384], help="of masks")
    parser.add_argument(
        "--segment", type=int, default=512, help="tokens of a segment in masks, run included; the last one is the tail"
    )
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 4096], help="of generation")
    parser.add_argument("--new_tokens", type=int, default=65)
    parser.add_argument("--mfu_shapes", choices=tuple(SHAPES), nargs="+", default=["llama1b", "llama8b"])
    parser.add_argument("--mfu_attention", nargs="+", default=["sdpa", "flex_attention"])
    parser.add_argument("--mfu_segments", type=int, default=8, help="the last one is the tail")
    parser.add_argument("--mfu_chunk", type=int, default=512)
    parser.add_argument("--product", type=int, default=8192, help="rows of the product that mfu compares with")
    parser.add_argument("--peak_tflops", type=float, help="of the device; measured by a product by default")
    return parser


def main(words: list[str] | None = None) -> None:
    """Measure, and write the figures after every part."""
    options = arguments().parse_args(words)
    device = options.device
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device: there is no CUDA device")
    parts = options.parts or [part for part in PARTS if part != "mfu" or device == "cuda"]
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    settings = {name: value for name, value in vars(options).items() if name not in ("out", "parts", "device")}
    result: dict[str, Any] = {
        "what": "median seconds and ratios of interleaved runs; see experiments/benchmarks/ccm.py",
        "settings": {**settings, "slots": SLOTS, "dtype": "bfloat16" if device == "cuda" else "float32"},
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg(),
        **provenance(),
    }
    for part in parts:
        start = time.perf_counter()
        result[part] = PARTS[part](options, device)
        result[f"{part}_took_seconds"] = round(time.perf_counter() - start, 1)
        write_json(options.out, result)
    print(f"-> {options.out}")


if __name__ == "__main__":
    main()
