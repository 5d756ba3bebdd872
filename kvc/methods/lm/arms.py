"""What an answer may see of what was read: the arms of a report, as rules for attention.

Every arm reads the context in full; eviction happens afterwards, so context tokens keep the keys and values that they
have with everything in sight. Tokens after the context see the first token (the attention sink), the most recent
ones, and what the rule of the arm keeps.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

WINDOW = 32
RECENT = 16
"""Tokens that random eviction never takes."""
ORACLE_RECENT = 24


class View(NamedTuple):
    """A batch seen from the tokens after the context.

    Attributes:
        distance: `[S, T]` position of the row minus position of the column; negative is the future.
        sink: `[B, T]` the first token of each row.
        context: `[B, T]` tokens of the context.
        coin: `[B, T]` a uniform draw for each token, the same for all arms.
        needed: `[B, S, T]` whether the row of the batch still needs the column's token (see `Example.lifetimes`).
        seen: `[B, S, T]` what causality and padding allow.
    """

    distance: Tensor
    sink: Tensor
    context: Tensor
    coin: Tensor
    needed: Tensor
    seen: Tensor


Rule = Callable[[View], Tensor]


def window(size: int) -> Rule:
    """The sink and the `size` most recent tokens, the one that is processed included."""
    return lambda view: view.sink[:, None] | (view.distance < size)


def random_eviction(share: float) -> Rule:
    """Each token stays with probability `share`; what a smaller share keeps, a larger one keeps too."""
    return lambda view: view.sink[:, None] | (view.distance < RECENT) | (view.coin < share)[:, None]


def no_context(view: View) -> Tensor:
    """Nothing of the context but the sink."""
    return view.sink[:, None] | ~view.context[:, None]


def oracle(view: View) -> Tensor:
    """The tokens that are still needed, and a few recent ones."""
    return view.sink[:, None] | (view.distance < ORACLE_RECENT) | view.needed


def window_like_oracle(view: View) -> Tensor:
    """For every token, a window that holds as many tokens as the oracle keeps for it."""
    size = (oracle(view) & view.seen).sum(-1, keepdim=True)
    return view.sink[:, None] | (view.distance < size - 1)


FULL = "full"
ARMS: dict[str, Rule] = {
    FULL: lambda view: torch.ones_like(view.seen),
    f"window {WINDOW}": window(WINDOW),
    "random 75%": random_eviction(0.75),
    "random 50%": random_eviction(0.5),
    "random 25%": random_eviction(0.25),
    "no context": no_context,
}
ORACLE_ARMS: dict[str, Rule] = {"oracle": oracle, "window like oracle": window_like_oracle}
"""For items whose lifetimes are known."""
SHORTCUT = "shortcut"
