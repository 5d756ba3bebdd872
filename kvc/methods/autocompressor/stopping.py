"""When a compression loop ends: soft gates that carry gradients, and hard rules.

p_t is the probability of stopping at step t. Everything is computed from its logit, in fp32, so that gates near 0 keep
their logarithm.

Shapes: B batch, T steps.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch.nn import functional as F

from kvc.errors import UserError

Gate = Literal["after", "before", "log"]
"""How a vector is weighed in training, by the survival s_t of the steps before it (s_1 = 1, s_t+1 = s_t (1 - p_t)).

* `after`: vectors are multiplied by s_t (1 - p_t); a vector at which the loop stops is dropped
* `before`: multiplied by s_t; a vector at which the loop stops is the last one
* `log`: as `after`, but the logarithm of the gate is added to the attention logits of the vector instead
"""
Rule = Literal["threshold", "greedy", "sample"]
Draws = torch.Generator | Sequence[torch.Generator] | None
"""Of random stops, on the CPU: one for the batch, or one for each row, which then stops as it would alone; None is the
global one."""


def log_gates(stop_logit: torch.Tensor, gate: Gate) -> torch.Tensor:
    """Logarithm of the gates.

    Args:
        stop_logit: Logit of p_t, fp32 `[B, T]`.
        gate: See `Gate`.

    Returns:
        fp32 `[B, T]`.
    """
    survived = F.logsigmoid(-stop_logit).cumsum(-1)
    if gate == "before":
        return F.pad(survived[:, :-1], (1, 0))
    return survived


def draw_stops(stop_logit: torch.Tensor, gate: Gate) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw where loops stop.

    A model can undo a soft gate: norms scale a small vector up again, and attention logits grow against the logarithm
    of a small gate. It then keeps what it needs at an expected length near 0, and a hard stop takes it away. A vector
    that a draw leaves out is really missing.

    Args:
        stop_logit: Logit of p_t, fp32 `[B, T]`.
        gate: See `Gate`.

    Returns:
        Which vectors are kept, bool `[B, T]`, and the logarithm of the probability of that, fp32 `[B]`.
    """
    # With `before` the last vector is there whether the loop would stop at it or not.
    logits = stop_logit[:, :-1] if gate == "before" else stop_logit
    stops = torch.rand_like(logits) < logits.detach().sigmoid()
    ended = stops.cumsum(-1) > 0
    first = stops & (stops.cumsum(-1) == 1)
    survived = F.logsigmoid(-logits).masked_fill(ended, 0).sum(-1)
    chance = survived + F.logsigmoid(logits).masked_fill(~first, 0).sum(-1)
    return ~(F.pad(ended, (1, 0)) if gate == "before" else ended), chance


class Stopping:
    """The hard rule.

    Args:
        rule: `threshold`: stop where p_t exceeds the threshold; `greedy`: where stopping is the most likely token;
            `sample`: with probability p_t.
        threshold: For the rule `threshold`.
        min_length: Steps that are never stopped at.

    Raises:
        UserError: If the settings do not fit together.
    """

    def __init__(self, rule: Rule = "greedy", threshold: float | None = None, min_length: int = 0) -> None:
        if rule not in ("threshold", "greedy", "sample"):
            raise UserError(f"stop_mode: '{rule}' is not one of threshold, greedy, sample")
        if (rule == "threshold") != (threshold is not None):
            how = "needed by" if rule == "threshold" else "without effect with"
            raise UserError(f"compress_stop_threshold: {how} the stop mode '{rule}'")
        if min_length < 0:
            raise UserError(f"min_length: cannot be negative, got {min_length}")
        self.rule, self.threshold, self.min_length = rule, threshold, min_length

    def __call__(
        self,
        step: int,
        stop_logit: torch.Tensor,
        top: torch.Tensor,
        ended: torch.Tensor | None = None,
        generator: Draws = None,
    ) -> torch.Tensor:
        """Which rows stop.

        Args:
            step: Number of the step, from 0 on.
            stop_logit: Logit of p_t, fp32 `[B]`.
            top: Whether stopping is the most likely token, bool `[B]`.
            ended: Rows that have stopped before, bool `[B]`, which draw nothing from generators of their own; None for
                no row.
            generator: Of the random rule.

        Returns:
            bool `[B]`.
        """
        if step < self.min_length:
            return torch.zeros_like(top)
        if self.rule == "greedy":
            return top
        p = stop_logit.sigmoid()
        if self.rule == "threshold":
            assert self.threshold is not None
            return p > self.threshold
        if generator is None or isinstance(generator, torch.Generator):
            return torch.rand(len(p), generator=generator).to(p.device) < p
        if len(generator) != len(p):
            raise ValueError(f"generator: {len(generator)} of them do not fit a batch of {len(p)}")
        over = torch.zeros_like(top) if ended is None else ended
        draws = [1.0 if done else float(torch.rand((), generator=g)) for g, done in zip(generator, over.tolist())]
        return torch.tensor(draws, device=p.device) < p
