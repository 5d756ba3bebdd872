"""What three epochs of the COMP classifier cost with stored hidden states, and with a model that runs every time.

    python -m experiments.benchmarks.comp_store --out experiments/results/comp_store.json

The unit is one pass of the language model over the data. All arms run in turn in one process, on a random model of
width 1024 with 4 layers, batch 64; medians over the rounds are reported. On a shared CPU the wall clock says as much
about the neighbours as about the code, so processor seconds of the same runs stand beside it.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer

from kvc.callbacks.throughput import peak_bytes
from kvc.cli import quiet
from kvc.core.backbone import Backbone
from kvc.core.files import write_json
from kvc.core.optim import Optim
from kvc.data.comp import CompTraces
from kvc.methods.comp import CompClassifier
from kvc.methods.comp.states import reasoning_states
from kvc.runs import provenance

UNITS = ("wall", "processor")
OVERRIDES = {
    "hidden_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "intermediate_size": 2816,
}


class Clock:
    """Wall and processor seconds since it was made, until `stop`."""

    def __init__(self) -> None:
        self.wall, self.processor = time.perf_counter(), time.process_time()

    def stop(self) -> "Clock":
        """Freeze the durations."""
        self.wall, self.processor = time.perf_counter() - self.wall, time.process_time() - self.processor
        return self


def one_pass(method: CompClassifier, data: CompTraces, batch: int) -> Clock:
    """Cost of one pass of the LM over the training traces."""
    items = [data.labelled[i] for i in data.dataset("train").ids]
    model = method.model()
    clock = Clock()
    for start in range(0, len(items), batch):
        part = items[start : start + batch]
        reasoning_states(model, [i.prompt_ids for i in part], [i.ids for i in part])
    return clock.stop()


def three_epochs(cache: bool, traces: int, batch: int) -> tuple[Clock, CompClassifier, CompTraces]:
    """Cost of a fit of three epochs, from an empty cache, loading of the model not counted."""
    backbone = Backbone(from_config=True, overrides=OVERRIDES)
    method = CompClassifier(backbone, cache=cache, optim=Optim(lr=5e-5))
    data = CompTraces(counts=(traces, 0, 0), steps=(2, 4), batch_size=batch)
    method.model()
    trainer = Trainer(
        accelerator="auto",
        devices=1,
        max_epochs=3,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        limit_val_batches=0,
    )
    with tempfile.TemporaryDirectory() as folder:
        os.environ["KVC_CACHE"] = folder
        clock = Clock()
        trainer.fit(method, datamodule=data)
        return clock.stop(), method, data


def main() -> None:
    """Run all arms and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--traces", type=int, default=128)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    quiet()
    torch.manual_seed(0)
    rounds: list[dict[str, dict[str, float]]] = []
    for _ in range(options.rounds):
        stored, _, _ = three_epochs(True, options.traces, options.batch)
        recomputed, method, data = three_epochs(False, options.traces, options.batch)
        single = one_pass(method, data, options.batch)
        arms = {"one_pass": single, "three_epochs_stored": stored, "three_epochs_recomputed": recomputed}
        rounds.append({unit: {name: round(getattr(c, unit), 3) for name, c in arms.items()} for unit in UNITS})
        print(rounds[-1], flush=True)

    def ratio(unit: str, name: str) -> float:
        return round(statistics.median(r[unit][name] / r[unit]["one_pass"] for r in rounds), 3)

    names = ("three_epochs_stored", "three_epochs_recomputed")
    result: dict[str, Any] = {
        "what": "seconds of wall clock and of processor; ratios are medians over rounds of (arm / one LM pass)",
        "model": {**OVERRIDES, "weights": "random"},
        "traces": options.traces,
        "batch": options.batch,
        "rounds": rounds,
        "ratios": {unit: {name: ratio(unit, name) for name in names} for unit in UNITS},
        "peak_mib": round(peak_bytes() / 2**20),
        **provenance(),
    }
    write_json(options.out, result)
    print(f"passes of the LM: {result['ratios']} -> {options.out}")


if __name__ == "__main__":
    main()
