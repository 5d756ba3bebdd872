"""What it costs to load a saved memory, beside reading its bytes.

    python -m experiments.benchmarks.cache_load --out experiments/results/cache_load_cpu.json

Arms, interleaved in one process, medians over rounds: `read` reads the file into memory; `mapped` is `load_memory`
without checking the content hash; `verified` with it; `pickled` is `torch.load` of the same tensors, for comparison.
The file is in the page cache for all of them, so this measures what software adds to the disk. `mapped` returns before
the rows were read: their pages come when attention asks for them, so `mapped_read` also copies every row. The model
is random; keys and values have the shape of an 8B Llama's (8 KV heads of 128), bf16. On a shared machine the processor
seconds say more than the wall clock.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kvc.cache.memory import KVMemory
from kvc.cache.store import load_memory, save_memory
from kvc.core.files import write_json
from kvc.runs import provenance

HEADS, SIZE = 8, 128


def model_of(layers: int) -> LlamaForCausalLM:
    """A model whose keys have the wanted shape and whose weights are few."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=layers,
            num_attention_heads=HEADS,
            num_key_value_heads=HEADS,
            head_dim=SIZE,
        )
    )


def timed(function: Callable[[], Any]) -> tuple[float, float]:
    """Wall and processor seconds of one call; what it returns is dropped after the clocks have stopped."""
    start, busy = time.perf_counter(), time.process_time()
    result = function()
    seconds = time.perf_counter() - start, time.process_time() - busy
    del result
    return seconds


def touch(memory: KVMemory) -> list[torch.Tensor]:
    """Copy every row once, so that its page is read."""
    return [part.clone() for layer in memory.layers for parts in layer.rows for part in parts]


def measure(model: LlamaForCausalLM, slots: int, rounds: int, folder: Path) -> dict[str, Any]:
    """All arms for memories of one length."""
    memory = KVMemory(model)
    for layer in range(len(memory.layers)):
        keys = torch.randn(1, HEADS, slots, SIZE).bfloat16()
        memory.append(layer, keys, keys.clone(), torch.arange(slots)[None])
    path, pickled = folder / "memory.safetensors", folder / "memory.pt"
    saving = timed(lambda: save_memory(memory, path, model))
    torch.save([layer.rows for layer in memory.layers], pickled)
    arms: dict[str, Callable[[], Any]] = {
        "read": path.read_bytes,
        "mapped": lambda: load_memory(path, model, verify=False),
        "mapped_read": lambda: touch(load_memory(path, model, verify=False)),
        "verified": lambda: load_memory(path, model),
        "pickled": lambda: torch.load(pickled, weights_only=True),
    }
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in arms}
    for number in range(rounds + 1):
        for name, arm in arms.items():
            value = timed(arm)
            if number:  # the first round warms up
                seconds[name].append(value)
    result: dict[str, Any] = {"slots": slots, "megabytes": round(path.stat().st_size / 1e6, 1)}
    for index, unit in enumerate(("wall", "processor")):
        medians = {name: statistics.median(value[index] for value in values) for name, values in seconds.items()}
        result[unit] = {
            "save_seconds": round(saving[index], 4),
            "seconds": {name: round(value, 5) for name, value in medians.items()},
            "ratio_to_read": {name: round(value / medians["read"], 3) for name, value in medians.items()},
        }
    return result


def main() -> None:
    """Run all lengths and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--slots", type=int, nargs="+", default=[512, 2048, 8192])
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = model_of(options.layers)
    with tempfile.TemporaryDirectory() as folder:
        lengths = [measure(model, slots, options.rounds, Path(folder)) for slots in options.slots]
    for length in lengths:
        print(length, flush=True)
    write_json(
        options.out,
        {
            "what": "seconds to load a memory, medians over rounds, and their ratio to reading its bytes",
            "load_average": os.getloadavg(),
            "shape": {"layers": options.layers, "kv_heads": HEADS, "head_dim": SIZE, "dtype": "bfloat16"},
            "rounds": options.rounds,
            "threads": torch.get_num_threads(),
            "lengths": lengths,
            **provenance(),
        },
    )
    print(f"-> {options.out}")


if __name__ == "__main__":
    main()
