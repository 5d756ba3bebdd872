"""Decoding on a growing memory beside decoding on one of fixed shapes: as it is, compiled, and as a CUDA graph.

    python -m experiments.benchmarks.static_decode --out experiments/results/static_decode_cpu.json

R-KV keeps `budget` rows and compresses after every `buffer` tokens; all arms get the same prompts and give the same
number of tokens. Arms run in turn; medians over the rounds of the time per step (decoding only, compressions included)
and their ratios are reported, beside the processor time of the whole call. Everything is compiled, and every library
warm, before the first round. Peak bytes are those of the memory (`kv`), and on a GPU what was allocated at most beyond
the weights, prefill included.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from kvc.core.files import write_json
from kvc.eviction.eviction import Eviction
from kvc.eviction.rkv import RKV
from kvc.eviction.triggers import BudgetBuffer
from kvc.generation.decode import generate
from kvc.generation.output import Output
from kvc.generation.static import StaticStep
from kvc.runs import provenance

TINY = Path(__file__).parents[2] / "data" / "tiny-lm"
MIDDLE = {
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 8192,
}


def make_model(name: str, device: str) -> PreTrainedModel:
    """`tiny`, or a random Llama of 512 x 8 (`middle`); bf16 on a GPU."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(TINY) if name == "tiny" else LlamaForCausalLM(LlamaConfig(**MIDDLE))
    return model.to(device, torch.bfloat16 if device == "cuda" else torch.float32).eval()


def decode(model: PreTrainedModel, prompts: torch.Tensor, step: StaticStep | None, options: Any) -> Output:
    """One call of an arm."""
    eviction = Eviction(RKV(), options.budget, BudgetBuffer(options.buffer))
    new = options.tokens
    return generate(model, prompts, compressor=eviction, max_new_tokens=new, eos_token_id=(), static=step)


def timed(model: PreTrainedModel, prompts: torch.Tensor, step: StaticStep | None, options: Any) -> dict[str, float]:
    """Milliseconds per step and peak bytes of one call."""
    if prompts.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    busy = time.process_time()
    output = decode(model, prompts, step, options)
    result = {
        "ms": 1000 * output.decode_seconds / (options.tokens - 1),
        "processor_ms": 1000 * (time.process_time() - busy) / options.tokens,
        "kv": sum(output.usage.summary(row)["kv_bytes_peak"] for row in range(len(prompts))),
        "compressions": output.compressions[0],
    }
    if prompts.is_cuda:
        result["allocated"] = torch.cuda.max_memory_allocated() - before
    return result


def measure(name: str, batch: int, options: Any, device: str) -> dict[str, Any]:
    """All arms on one model and batch size."""
    model = make_model(name, device)
    draw = torch.Generator().manual_seed(batch)
    prompts = torch.randint(3, model.config.vocab_size, (batch, options.prompt), generator=draw).to(device)
    modes = [mode for mode in options.modes if mode != "graph" or device == "cuda"]
    steps: dict[str, StaticStep | None] = {"dynamic": None, **{mode: StaticStep(mode) for mode in modes}}
    tokens, warm_up = {}, {}
    for arm, step in steps.items():
        start = time.perf_counter()
        tokens[arm] = decode(model, prompts, step, options).tokens
        warm_up[arm] = round(time.perf_counter() - start, 2)
    runs = [{arm: timed(model, prompts, step, options) for arm, step in steps.items()} for _ in range(options.rounds)]
    medians = {arm: {unit: statistics.median(run[arm][unit] for run in runs) for unit in runs[0][arm]} for arm in steps}
    return {
        "model": name,
        "batch": batch,
        "compressions": {arm: units.pop("compressions") for arm, units in medians.items()},
        "median": {arm: {unit: round(value, 4) for unit, value in units.items()} for arm, units in medians.items()},
        "speed_up": {
            unit: {arm: round(medians["dynamic"][unit] / medians[arm][unit], 3) for arm in steps}
            for unit in ("ms", "processor_ms")
        },
        "first_call_seconds": warm_up,
        "same_tokens": {arm: tokens[arm] == tokens["dynamic"] for arm in steps},
        "runs": [{arm: {unit: round(value, 4) for unit, value in run[arm].items()} for arm in steps} for run in runs],
    }


def main() -> None:
    """Measure and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", choices=("tiny", "middle"), nargs="+", default=["tiny", "middle"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument(
        "--modes", choices=("eager", "compile", "graph"), nargs="+", default=["eager", "compile", "graph"]
    )
    parser.add_argument("--budget", type=int, default=256)
    parser.add_argument("--buffer", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=257)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=None, help="processor threads; the machine's number by default")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    cases = []
    for name in options.models:
        for batch in options.batches:
            cases.append(measure(name, batch, options, device))
            print(
                {part: cases[-1][part] for part in ("model", "batch", "median", "speed_up", "same_tokens")}, flush=True
            )
    processor = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    shapes = {part: getattr(options, part) for part in ("budget", "buffer", "prompt", "tokens", "rounds")}
    result = {
        "what": "milliseconds per decoding step of a batch; speed_up = dynamic / arm, medians of interleaved runs",
        "shapes": {**shapes, "dtype": "bfloat16" if device == "cuda" else "float32"},
        "device": torch.cuda.get_device_name() if device == "cuda" else processor[0].split(":")[1].strip(),
        "threads": torch.get_num_threads(),
        "cases": cases,
        **provenance(),
    }
    write_json(options.out, result)
    print(f"-> {options.out}")


if __name__ == "__main__":
    main()
