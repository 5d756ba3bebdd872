"""Writes what an evaluation said: predictions, pictures, `result.json`, TensorBoard scalars and HParams."""

import json
import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from kvc.core.files import atomic, write_json, write_text
from kvc.core.module import KvcModule
from kvc.core.results import Summary
from kvc.runs import PREDICTIONS, RESULT, identity_hash, identity_of, provenance


class ResultWriter(Callback):
    """Writes the files of one evaluation when it ends, on rank zero.

    The CLI sets the attributes before each evaluation.

    Attributes:
        folder: Folder of the evaluation; None writes nothing.
        command: `fit`, `validate`, `test` or `predict`.
        config: Full configuration, for identity and HParams.
        also: Second place for `result.json` (the run folder, at the end of `fit`).
        extra: Further keys of `result.json`.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config
        self.folder: Path | None = None
        self.command = ""
        self.also: Path | None = None
        self.extra: dict[str, Any] = {}
        self._started = 0.0
        self._fit_started: float | None = None
        self._fit_before = 0.0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock of training."""
        self._fit_started = time.perf_counter()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock of training."""
        self._fit_before, self._fit_started = self.fit_seconds(), None

    def fit_seconds(self) -> float:
        """Seconds of training so far, over all sessions of the run."""
        running = time.perf_counter() - self._fit_started if self._fit_started is not None else 0.0
        return self._fit_before + running

    def state_dict(self) -> dict[str, float]:
        """The clock goes into checkpoints."""
        return {"fit_seconds": self.fit_seconds()}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        """A resumed run goes on counting."""
        if self._fit_started is None and self._fit_before == 0.0:
            self._fit_before = state_dict["fit_seconds"]

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock of the evaluation."""
        self._started = time.perf_counter()

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock of the evaluation."""
        self._started = time.perf_counter()

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write everything."""
        self._write(trainer, pl_module)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write predictions and a result without metrics."""
        self._write(trainer, pl_module)

    def _write(self, trainer: Trainer, module: LightningModule) -> None:
        assert isinstance(module, KvcModule)
        if self.folder is None or module.evaluated is None or not trainer.is_global_zero:
            return
        records, summary = module.evaluated
        lines = (json.dumps(record, ensure_ascii=False, allow_nan=False) for record in records)
        write_text(self.folder / PREDICTIONS, "".join(line + "\n" for line in lines))
        pictures = self._draw(trainer, module, records, summary) if summary is not None else []
        result = self._result(trainer, module, summary, len(records), pictures)
        if summary is not None:
            self._log_hparams(trainer, summary)
        write_json(self.folder / RESULT, result)
        if self.also is not None:
            write_json(self.also / RESULT, result)

    def _draw(self, trainer: Trainer, module: KvcModule, records: list[Any], summary: Summary) -> list[str]:
        assert self.folder is not None
        names = []
        for name, figure in module.figures(records, summary).items():
            with atomic(self.folder / f"{name}.png") as temporary:
                figure.savefig(temporary, dpi=150, format="png")
            for logger in trainer.loggers:
                if isinstance(logger, TensorBoardLogger):
                    logger.experiment.add_figure(f"{self.folder.name}/{name}", figure, trainer.global_step, close=True)
            names.append(f"{name}.png")
        return names

    def _result(
        self, trainer: Trainer, module: KvcModule, summary: Summary | None, count: int, pictures: list[str]
    ) -> dict[str, Any]:
        data = trainer.datamodule  # type: ignore[attr-defined]
        model = self.config.get("model", {})
        return {
            "schema": 1,
            "command": self.command,
            "method": model.get("class_path", type(module).__qualname__),
            "seed": self.config.get("seed_everything"),
            "identity": identity_hash(self.config),
            "split": data.eval_split,
            "samples": count,
            "headline": list(module.headline),
            **(summary.as_dict() if summary is not None else {}),
            "base_model": module.base_identity(),
            "data": {"hash": data.data_hash(), **data.describe()},
            "sizes": module.sizes(),
            "timing": {
                "steps": trainer.global_step,
                "fit_seconds": round(self.fit_seconds(), 3),
                "evaluation_seconds": round(time.perf_counter() - self._started, 3),
            },
            "pictures": pictures,
            "config": self.config,
            **provenance(),
            **self.extra,
        }

    def _log_hparams(self, trainer: Trainer, summary: Summary) -> None:
        metrics = {f"final/{name}": value.value for name, value in summary.metrics.items()}
        parameters = {
            key: value if isinstance(value, int | float | str | bool) else str(value)
            for key, value in identity_of(self.config).items()
            if value is not None
        }
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.log_hyperparams(parameters, metrics)
            else:
                logger.log_hyperparams(parameters)
                logger.log_metrics(metrics)
