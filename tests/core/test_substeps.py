import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import nn

from kvc.core.datamodule import KvcDataModule, Split
from kvc.core.method import Method, StepOutput
from kvc.core.optim import Optim
from kvc.core.substeps import backward_all_but_last

PIECES = 3


class Rows(KvcDataModule):
    """Rows of three numbers."""

    def dataset(self, split: Split) -> Any:
        return _Numbers()

    def has_split(self, split: Split) -> bool:
        return split == "train"

    def data_hash(self) -> str:
        return "rows"


class _Numbers:
    def __len__(self) -> int:
        return 16

    def __getitem__(self, key: tuple[int, int]) -> torch.Tensor:
        return torch.sin(torch.arange(PIECES) + 10.0 * key[1])


class Toy(Method):
    """Each substep is the loss of one column; all share both parameters."""

    def __init__(self, pieces: bool) -> None:
        super().__init__(Optim(lr=0.01, schedule="constant"), seed=3)
        self.pieces = pieces
        self.a = nn.Parameter(torch.tensor(0.3))
        self.b = nn.Parameter(torch.tensor(-0.2))
        self.gradients: list[list[float]] = []

    def column(self, batch: Any, number: int) -> torch.Tensor:
        return ((self.a * batch[:, number] - self.b).tanh() ** 2).sum() * (number + 1)

    def step(self, batch: Any) -> StepOutput:
        total = torch.stack([self.column(batch, i) for i in range(PIECES)]).sum()
        return StepOutput(total, torch.tensor(PIECES * len(batch)))

    def substeps(self, batch: Any) -> Sequence[Callable[[], StepOutput]]:
        if not self.pieces:
            return super().substeps(batch)
        count = torch.tensor(len(batch))
        return [lambda i=i: StepOutput(self.column(batch, i), count) for i in range(PIECES)]  # type: ignore[misc]

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        super().on_before_optimizer_step(optimizer)
        self.gradients.append([float(self.a.grad), float(self.b.grad)])


class Keep(Callback):
    """Brings gradients and weights of rank zero back from the forked processes."""

    def __init__(self, path: Any) -> None:
        self.path = path

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.is_global_zero:
            torch.save([pl_module.gradients, [pl_module.a.item(), pl_module.b.item()]], self.path)


def outcome(tmp_path: Any, pieces: bool, batch: int, **settings: Any) -> torch.Tensor:
    """Gradients of every optimiser step, and the weights at the end."""
    path = tmp_path / "outcome.pt"
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        limit_val_batches=0,
        callbacks=[Keep(path)],
        **{"devices": 1, **settings},
    )
    trainer.fit(Toy(pieces), datamodule=Rows(batch_size=batch))
    gradients, weights = torch.load(path, weights_only=True)
    return torch.tensor([*gradients, weights], dtype=torch.float64)


DDP = {"strategy": "ddp_fork", "devices": 2}


@pytest.mark.parametrize("accumulate", [1, 2])
def test_gradient_of_the_pieces_is_that_of_their_sum(tmp_path: Any, accumulate: int) -> None:
    whole = outcome(tmp_path, False, 4, accumulate_grad_batches=accumulate)
    pieces = outcome(tmp_path, True, 4, accumulate_grad_batches=accumulate)
    assert len(whole) == 4 // accumulate + 1
    assert torch.allclose(whole, pieces, rtol=0, atol=1e-7)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_ranks_equal_one_process_with_twice_the_rows(tmp_path: Any, accumulate: int) -> None:
    single = outcome(tmp_path, True, 4, accumulate_grad_batches=accumulate)
    double = outcome(tmp_path, True, 2, accumulate_grad_batches=accumulate, **DDP)
    assert torch.allclose(single, double, rtol=0, atol=1e-7)


def test_batches_that_are_accumulated_equal_one_large_batch(tmp_path: Any) -> None:
    assert torch.allclose(
        outcome(tmp_path, True, 4), outcome(tmp_path, True, 2, accumulate_grad_batches=2), rtol=0, atol=1e-7
    )


def test_graph_of_an_earlier_substep_is_gone_before_the_next_begins() -> None:
    weight = nn.Parameter(torch.ones(4))
    alive: list[weakref.ref[torch.Tensor]] = []
    seen: list[int] = []

    def substep() -> torch.Tensor:
        seen.append(sum(ref() is not None for ref in alive))
        activation = weight.exp()
        alive.append(weakref.ref(activation))
        return (activation * activation).sum()

    class Strategy:
        def backward(self, loss: torch.Tensor, optimizer: Any) -> None:
            loss.backward()

    class Running:
        strategy = Strategy()

    loss = backward_all_but_last(Running(), [substep] * PIECES)  # type: ignore[arg-type]
    assert seen == [0, 0, 0]
    loss.backward()
    assert torch.allclose(weight.grad, PIECES * 2 * torch.exp(torch.tensor(2.0)).expand(4))


def test_a_step_needs_a_substep() -> None:
    with pytest.raises(ValueError, match="at least one substep"):
        backward_all_but_last(None, [])  # type: ignore[arg-type]
