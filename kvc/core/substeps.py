"""Truncated back-propagation through time: several backward passes inside one training step."""

from collections.abc import Callable, Sequence

import torch
from lightning.pytorch import Trainer


def backward_all_but_last(trainer: Trainer, substeps: Sequence[Callable[[], torch.Tensor]]) -> torch.Tensor:
    """Run every substep; back-propagate all but the last, whose loss is returned for Lightning to back-propagate.

    Each substep's graph is freed before the next is built, so peak memory is that of the longest substep. Gradients add
    up in `.grad`; under DDP nothing is sent until the backward pass of the returned loss, which reduces the whole sum
    at once. Every trainable parameter must take part in the last substep, or the strategy be
    `ddp_find_unused_parameters_true`.

    Args:
        trainer: The running trainer (automatic optimisation).
        substeps: Functions that return a scalar loss with its own graph, in order; state between them is the caller's,
            detached.

    Raises:
        ValueError: If `substeps` is empty.
    """
    if not substeps:
        raise ValueError("a training step needs at least one substep")
    for substep in substeps[:-1]:
        trainer.strategy.backward(substep(), None)
    return substeps[-1]()
