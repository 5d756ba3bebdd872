"""Speed and memory of training, as TensorBoard scalars."""

import resource
import sys
import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer


class Throughput(Callback):
    """Logs steps and loss units (tokens, labelled positions) a second, and the peak memory of device or process."""

    def __init__(self) -> None:
        self._time = 0.0
        self._step = 0
        self._units = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._time, self._step = time.perf_counter(), trainer.global_step
        self._units = getattr(pl_module, "units_seen", 0.0)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log at the trainer's logging interval."""
        steps = trainer.global_step - self._step
        if steps < trainer.log_every_n_steps:  # type: ignore[attr-defined]
            return
        now, units = time.perf_counter(), getattr(pl_module, "units_seen", 0.0)
        pl_module.log("perf/steps_per_second", steps / (now - self._time))
        pl_module.log("perf/units_per_second", trainer.world_size * (units - self._units) / (now - self._time))
        pl_module.log("perf/peak_mib", peak_bytes() / 2**20)
        self._time, self._step, self._units = now, trainer.global_step, units


def peak_bytes() -> int:
    """Peak bytes allocated on the current CUDA device, or the peak resident size of this process."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
