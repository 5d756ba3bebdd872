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
        if not self._due(trainer):
            return
        done, total = trainer.global_step, pl_module.total_steps()  # type: ignore[operator]
        rate = (done - self._first_step) / (self._last - self._begun)
        loss = trainer.callback_metrics.get("train/loss")
        shown = "" if loss is None else f"loss {float(loss):.4f}  "
        print(f"step {done}/{total}  {shown}{rate:.1f} steps/s  {_left(total - done, rate)} left", flush=True)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._begun = self._last = time.monotonic()

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self.on_test_start(trainer, pl_module)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Print if it is time."""
        self._evaluated(trainer, batch_idx + 1, sum(trainer.num_test_batches))

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Print if it is time."""
        self._evaluated(trainer, batch_idx + 1, sum(trainer.num_predict_batches))

    def _evaluated(self, trainer: Trainer, done: int, total: float) -> None:
        if self._due(trainer):
            rate = done / (self._last - self._begun)
            print(f"batch {done}/{total}  {_left(total - done, rate)} left", flush=True)

    def _due(self, trainer: Trainer) -> bool:
        """Whether it is time for a line; if so, the next one is counted from now."""
        now = time.monotonic()
        if now - self._last < self.every or not trainer.is_global_zero:
            return False
        self._last = now
        return True


def _left(count: float, rate: float) -> timedelta | str:
    return timedelta(seconds=round(count / rate)) if rate and count != float("inf") else "unknown"
