"""How many slots a memory needs at most while an eviction works on it.

Shapes: L layers, B batch, H KV heads.
"""

import torch

from kvc.eviction.triggers import Trigger


def slots(held: torch.Tensor, budgets: list[int], trigger: Trigger) -> list[int] | None:
    """Slots of each layer that are enough from here on.

    A layer is fullest just before a compression: at what it held after the one before, and the tokens that the trigger
    lets come in between. Triggers count the mean over layers, so under budgets that differ the layers with more than
    the mean outgrow their share: a layer at its budget b stands beside others at min(b, their budget).

    Args:
        held: Rows in memory after the prefill and its compression, int64 `[L, B, H]`.
        budgets: Rows of each layer after a compression.
        trigger: When to compress.

    Returns:
        One number for each layer; None where the trigger sets no bound, or where layers or heads hold different rows
        for other reasons than their budgets.
    """
    most = held.amax(dim=(0, 2))[None, :, None]
    limits = torch.tensor(budgets, device=held.device)[:, None, None]
    if bool((held != most).any()) and bool((held != torch.minimum(most, limits)).any()):
        return None
    first = [trigger.room(cached) for cached in held.float().mean(dim=(0, 2)).long().tolist()]
    later = [trigger.room(sum(min(budget, other) for other in budgets) // len(budgets)) for budget in budgets]
    result = []
    for budget, after, rows in zip(budgets, later, held.amax(2).tolist()):
        if after is None:
            return None
        result.append(max([budget + after, *(row + room for row, room in zip(rows, first) if room is not None)]))
    return result
