"""Budgets per layer that share one total."""

from itertools import pairwise

from kvc.errors import UserError


def uniform(budget: int, layers: int) -> list[int]:
    """The same budget for every layer."""
    return [budget] * layers


def pyramid(budget: int, layers: int, beta: float = 20.0, floor: int = 0) -> list[int]:
    """Budgets that fall linearly from the first layer to the last, as in PyramidKV (Cai et al. 2024).

    What every layer keeps anyway (`floor`: window and prefix) is not shared out. Of the rest the last layer gets
    1 / beta of the mean and the first as much above the mean as the last lies below.

    Args:
        budget: Mean tokens per layer and KV head.
        layers: Number of layers.
        beta: Mean over the last layer's share; 1 gives equal budgets.
        floor: Tokens that each layer keeps in any case.

    Returns:
        One budget per layer; they add up to `budget * layers`.

    Raises:
        UserError: If beta is below 1, or nothing is left to share out.
    """
    if beta < 1:
        raise UserError(f"beta: must be at least 1, got {beta}")
    if budget <= floor:
        raise UserError(f"budget: must exceed the {floor} tokens that every layer keeps, got {budget}")
    shared = budget - floor
    last = max(1.0, shared / beta)
    first = 2 * shared - last
    step = (first - last) / max(layers - 1, 1)
    # Rounding the running total, not the parts, keeps the sum exact.
    ends = [round(sum(first - step * i for i in range(layer))) for layer in range(layers)] + [shared * layers]
    return [floor + after - before for before, after in pairwise(ends)]
