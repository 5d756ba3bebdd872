"""Base of every trainable method."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.distributed
from lightning.pytorch.loggers import TensorBoardLogger
from torch import nn

from kvc.core import seeds
from kvc.core.module import Batch, KvcModule
from kvc.core.optim import Optim
from kvc.core.substeps import backward_all_but_last
from kvc.errors import UserError


@dataclass
class StepOutput:
    """Outcome of one forward pass.

    Attributes:
        loss_sum: Loss summed over tokens, scalar. A term that is a mean over rows enters times `num_tokens`.
        num_tokens: Number of tokens (or other units) that `loss_sum` sums over, scalar.
        metrics: Further scalars to log, means over this batch.
    """

    loss_sum: torch.Tensor
    num_tokens: torch.Tensor
    metrics: dict[str, torch.Tensor] = field(default_factory=dict)


class Method(KvcModule):
    """A method writes its modules and `step(batch)`; the base does the rest.

    The loss of an optimiser step is the sum of `loss_sum` over ranks and accumulated batches, divided by the sum of
    `num_tokens` over the same: two ranks equal one process with twice the batch, and ragged rows weigh by their tokens.
    Gradients are rescaled just before clipping, so Trainer clipping and accumulation work as usual.

    Checkpoints hold what is trained (and buffers outside the frozen base model), the optimiser, the random state of
    every rank, and the names of the method and base model, so that a foreign checkpoint is refused.

    Args:
        optim: Optimiser and schedule.
        seed: Seed of the run.
    """

    monitor: ClassVar[tuple[str, str]] = ("val/loss", "min")
    """Metric and direction (min, max) by which the best checkpoint is chosen."""
    frozen: tuple[str, ...] = ("backbone",)
    """Attributes that hold the base model: their untrained weights and buffers stay out of checkpoints."""

    def __init__(self, optim: Optim | None = None, seed: int = seeds.DEFAULT_SEED) -> None:
        super().__init__(seed)
        self.optim = optim or Optim()
        self.strict_loading = False
        self.units_seen = 0.0
        self._tokens = torch.zeros((), dtype=torch.float64)
        self._val = torch.zeros(2, dtype=torch.float64)
        self._rng: dict[str, Any] | None = None
        self._pending: dict[str, Any] = {}

    # ------------------------------------------------------------------ what a method writes

    def step(self, batch: Batch) -> StepOutput:
        """Training loss of one batch."""
        raise NotImplementedError(f"{type(self).__name__} has no training step")

    def substeps(self, batch: Batch) -> Sequence[Callable[[], StepOutput]]:
        """The pieces of a training step that are back-propagated one after the other; by default `step` alone."""
        return [lambda: self.step(batch)]

    def group_of(self, name: str) -> str:
        """Optimiser group of a trainable parameter, by its dotted name; `Optim.lrs` sets rates by these."""
        return "lora" if ".lora_" in name else "model"

    def groups(self) -> dict[str, list[nn.Parameter]]:
        """Trainable parameters by optimiser group."""
        groups: dict[str, list[nn.Parameter]] = {}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                groups.setdefault(self.group_of(name), []).append(parameter)
        return groups

    # ------------------------------------------------------------------ training

    def on_fit_start(self) -> None:
        """Refuse precisions that would cast trained weights, and give each rank its own dropout masks."""
        precision = str(self.trainer.precision)
        if precision in {"bf16-true", "16-true", "16-mixed"}:
            raise UserError(f"trainer.precision: {precision} is not supported for training, use bf16-mixed or 32-true")
        interval = self.trainer.val_check_interval
        if isinstance(interval, int) and self.trainer.check_val_every_n_epoch is not None:
            batches = self.trainer.datamodule.train_batches()  # type: ignore[attr-defined]
            if interval > batches:
                raise UserError(f"trainer.val_check_interval: {interval} exceeds the {batches} batches of an epoch")
        self.train()
        torch.manual_seed(self.seed + self.global_rank)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Put the random state of the checkpoint back, once, right before the first draw after a resume."""
        if batch_idx % self.trainer.accumulate_grad_batches == 0:
            for optimizer in self.trainer.optimizers:
                optimizer.zero_grad()
        if self._rng is not None:
            seeds.restore(self._rng)
            self._rng = None
            for name, parameter in self.named_parameters():
                if name in self._pending:
                    parameter.grad = self._pending[name].to(parameter)
            self._pending = {}

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        """Do nothing: Lightning calls this after `training_step`, which would wipe the gradients of early substeps."""

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        """Back-propagate the summed loss; `on_before_optimizer_step` turns the sum into a mean."""
        outputs: list[StepOutput] = []

        def loss(piece: Callable[[], StepOutput]) -> torch.Tensor:
            outputs.append(piece())
            return outputs[-1].loss_sum

        last = backward_all_but_last(self.trainer, [lambda p=p: loss(p) for p in self.substeps(batch)])  # type: ignore[misc]
        tokens = sum(o.num_tokens.detach().double().cpu() for o in outputs)
        self._tokens = self._tokens + tokens
        self.units_seen += float(tokens)
        total = sum(o.loss_sum.detach() for o in outputs)
        self.log("train/loss", total / max(float(tokens), 1.0), prog_bar=True)
        for name, value in outputs[-1].metrics.items():
            self.log(f"train/{name}", value)
        # Lightning divides the first loss by accumulate_grad_batches; the sum must stay a sum.
        return last * self.trainer.accumulate_grad_batches

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Divide the accumulated gradient of the summed loss by the tokens of all ranks and batches."""
        tokens = self.summed(self._tokens)
        # DDP has averaged the gradient over ranks.
        scale = (self.trainer.world_size / tokens.clamp(min=1.0)).float()
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        torch._foreach_mul_(gradients, scale)
        self._tokens = torch.zeros((), dtype=torch.float64)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Loss per token over the whole split: sums and counts are logged and divided at the end."""
        self.validated(self.step(batch))

    def validated(self, output: StepOutput) -> None:
        """Count a batch in the loss of the running validation."""
        self._val += torch.stack([output.loss_sum.detach(), output.num_tokens]).double().cpu()

    def on_validation_epoch_end(self) -> None:
        """Log the loss per token over all ranks."""
        loss, tokens = self.summed(self._val)
        self._val = torch.zeros(2, dtype=torch.float64)
        self.log("val/loss", (loss / tokens.clamp(min=1)).float(), prog_bar=True)

    def log_histogram(self, name: str, counts: torch.Tensor, edges: Sequence[float]) -> None:
        """Draw a histogram in TensorBoard, at the step that has been reached.

        Args:
            name: Its tag.
            counts: Of every bin, `[n]`, already summed over ranks.
            edges: Bounds of the bins, n + 1 in rising order.
        """
        middles = (torch.tensor(edges[:-1], dtype=torch.float64) + torch.tensor(edges[1:], dtype=torch.float64)) / 2
        counts = counts.double().cpu()
        if self.trainer.sanity_checking or not self.trainer.is_global_zero or not counts.any():
            return
        for logger in self.trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_histogram_raw(
                    name,
                    min=edges[0],
                    max=edges[-1],
                    num=float(counts.sum()),
                    sum=float((counts * middles).sum()),
                    sum_squares=float((counts * middles**2).sum()),
                    bucket_limits=list(edges[1:]),
                    bucket_counts=counts.tolist(),
                    global_step=self.trainer.global_step,
                )

    def summed(self, value: torch.Tensor) -> torch.Tensor:
        """The sum over ranks, in fp64 where the device has it."""
        value = value.to(self.device, torch.float32 if self.device.type == "mps" else torch.float64)
        if self.trainer.world_size > 1:
            torch.distributed.all_reduce(value)
        return value

    def configure_optimizers(self) -> Any:
        """One optimiser with named groups, one schedule stepped at every optimiser step."""
        groups = self.groups()
        if not groups:
            raise UserError(f"{type(self).__name__} has no trainable parameter")
        try:
            optimizer, schedule = self.optim.build(groups, self.total_steps())
        except ValueError as error:
            raise UserError(str(error)) from error
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def total_steps(self) -> int:
        """Optimiser steps of the run: `max_steps`, or epochs times batches as the datamodule counts them."""
        # trainer.estimated_stepping_batches would build the loaders early and break exact mid-epoch resume.
        if self.trainer.max_steps > 0:
            return self.trainer.max_steps
        batches = self.trainer.datamodule.train_batches()  # type: ignore[attr-defined]
        limit = self.trainer.limit_train_batches
        batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
        if (self.trainer.max_epochs or 1) < 0:
            raise UserError("trainer.max_epochs: -1 needs trainer.max_steps, since a schedule has a length")
        steps = -(-batches // self.trainer.accumulate_grad_batches)
        return max(1, steps * (self.trainer.max_epochs or 1))

    # ------------------------------------------------------------------ checkpoints

    def trained_state(self) -> dict[str, torch.Tensor]:
        """Trained parameters and the method's own persistent buffers, by name."""
        trained = {name for name, p in self.named_parameters() if p.requires_grad}
        return {
            name: value
            for name, value in self.state_dict().items()
            if name in trained or name.split(".", 1)[0] not in self.frozen
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep only what is trained; add the random state of every rank and what the checkpoint belongs to."""
        checkpoint["state_dict"] = self.trained_state()
        state: dict[str, Any] = {"rng": seeds.capture(), "tokens": self._tokens, "gradients": {}}
        if float(self._tokens):
            # In the midst of accumulation, the gradients so far are part of the state.
            state["gradients"] = {n: p.grad.cpu() for n, p in self.named_parameters() if p.grad is not None}
        states = [state]
        if self.trainer.world_size > 1:
            states = [{}] * self.trainer.world_size
            torch.distributed.all_gather_object(states, state)
        checkpoint["kvc"] = {
            "method": class_path(self),
            "base": self.base_identity().get("hash", ""),
            "data": getattr(self.trainer.datamodule, "data_hash", str)(),  # type: ignore[attr-defined]
            "ranks": states,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another method or base model, or with trained weights missing."""
        path = self._trainer.ckpt_path if self._trainer is not None else None
        self.check_checkpoint(checkpoint, str(path or "the checkpoint"))
        states = checkpoint["kvc"]["ranks"]
        if self._trainer is not None and self.trainer.training:
            if len(states) != self.trainer.world_size:
                raise UserError(f"{path} was written by {len(states)} ranks: go on with as many, or start a new run")
            state = states[self.global_rank]
            self._rng, self._pending, self._tokens = state["rng"], state["gradients"], state["tokens"]

    def check_checkpoint(self, checkpoint: dict[str, Any], where: str) -> None:
        """Check that `checkpoint` was written by this method, on this base model, with all trained weights.

        Raises:
            UserError: If not; the sentence names `where`.
        """
        origin = checkpoint.get("kvc")
        if origin is None:
            raise UserError(f"{where} was not written by kvc")
        if origin["method"] != class_path(self):
            raise UserError(f"{where} belongs to the method {origin['method']}, not to {class_path(self)}")
        base = self.base_identity().get("hash", "")
        if origin["base"] != base:
            raise UserError(f"{where} was trained on another base model (hash {origin['base']}, here {base})")
        mine, theirs = self.trained_state(), checkpoint["state_dict"]
        if missing := sorted(set(mine) - set(theirs)):
            raise UserError(f"{where} lacks {len(missing)} trained tensors, e.g. {missing[0]}")
        if other := [name for name, value in mine.items() if theirs[name].shape != value.shape]:
            shapes = f"{list(theirs[other[0]].shape)}, here {list(mine[other[0]].shape)}"
            raise UserError(f"{where} holds {len(other)} tensors of other shapes, e.g. {other[0]}: {shapes}")


def class_path(value: object) -> str:
    """Import path of an object's class."""
    return f"{type(value).__module__}.{type(value).__qualname__}"
