"""The checkpoint that a run resumes from, written only where a resumed run gives the bits of an uninterrupted one."""

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException


class LastCheckpoint(Checkpoint):
    """Writes `path` every so many steps, at the end of each epoch, when training ends, and on SIGTERM.

    Lightning cannot resume between a batch and the validation that follows it: it skips the validation and, on the last
    batch of an epoch, the whole next epoch. A save that falls due there waits until the validation is over. The other
    checkpoint callbacks come first in the list, so that what they know is in the file.

    Args:
        path: The file; replaced each time.
        every: Steps between saves; 0 saves at the ends of epochs only.
    """

    def __init__(self, path: Path, every: int = 0) -> None:
        self.path, self.every = path, every
        self._saved = -1
        self._due = self._trained = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What is being resumed needs no saving."""
        self._saved = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save if it is time, unless a validation or the end of the epoch follows."""
        self._trained = True
        step = trainer.global_step
        if not self.every or step % self.every or step == self._saved:
            return
        loop = trainer.fit_loop.epoch_loop
        fetcher = trainer.fit_loop._data_fetcher
        assert fetcher is not None
        self._due = True
        if not (loop.batch_progress.is_last_batch or loop._should_check_val_fx(fetcher)):
            self._save(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save what fell due before a validation within the epoch."""
        if self._due and not trainer.sanity_checking and not trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            self._save(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save what fell due on the last batch; without `every`, save each epoch."""
        if self._due or not self.every:
            self._save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From here on a restart goes straight to the evaluation, and leaves the file as it is."""
        if self._trained:
            self._save(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save on SIGTERM, which is raised between batches; anything else may leave a step half done."""
        if isinstance(exception, SIGTERMException) and trainer.training and trainer.global_step != self._saved:
            self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        self._saved, self._due = trainer.global_step, False
        trainer.save_checkpoint(self.path)
