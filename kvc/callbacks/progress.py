"""Progress where nobody watches a terminal: one line now and then, with an estimate of what is left."""

import time
from datetime import timedelta
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class LineProgress(Callback):
    """Prints a line of progress at most every `every` seconds; used when the output is not a terminal.

    Args:
        every: Seconds between lines.
    """

    def __init__(self, every: float = 20.0) -> None:
        self.every = every
        self._begun = self._last = 0.0
        self._first_step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._begun = self._last = time.monotonic()
        self._first_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Print if it is time."""
        now = time.monotonic()
        if now - self._last < self.every or not trainer.is_global_zero:
            return
        self._last = now
        done, total = trainer.global_step, pl_module.total_steps()  # type: ignore[operator]
        rate = (done - self._first_step) / (now - self._begun)
        left = timedelta(seconds=round((total - done) / rate)) if rate else "unknown"
        loss = trainer.callback_metrics.get("train/loss")
        print(
            f"step {done}/{total}  loss {float(loss):.4f}  {rate:.1f} steps/s  {left} left"
            if loss is not None
            else f"step {done}/{total}  {rate:.1f} steps/s  {left} left",
            flush=True,
        )
