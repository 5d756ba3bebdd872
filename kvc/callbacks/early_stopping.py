"""Training ends when the held-out loss no longer falls."""

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks.early_stopping import EarlyStopping, EarlyStoppingReason


class StopEarly(EarlyStopping):
    """Ends training when a metric has not improved for some validations; the best checkpoint is then evaluated.

    A run that was killed between its early end and its evaluation goes straight to the evaluation, as it would have;
    Lightning's own callback trains on until the next validation.

    Args:
        patience: Validations without improvement after which training ends.
        min_delta: Smallest change that counts as an improvement.
        monitor: Metric to watch.
        mode: `min` if it should fall, `max` if it should rise.
    """

    def __init__(self, patience: int = 3, min_delta: float = 0.0, monitor: str = "val/loss", mode: str = "min") -> None:
        # At the end of an epoch that max_steps cut short there was no validation.
        super().__init__(monitor, min_delta, patience, mode=mode, check_on_train_epoch_end=False)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do not go on with what had ended."""
        if self.stopping_reason is not EarlyStoppingReason.NOT_STOPPED:
            trainer.should_stop = True
