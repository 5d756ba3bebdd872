"""Random eviction: the control that every score has to beat."""

import torch

from kvc.core.seeds import DEFAULT_SEED
from kvc.eviction.policy import Layer, Order, Policy, View

# Odd 64-bit constants of the finaliser of SplitMix64 (Steele, Lea, Flood 2014), as signed integers.
_MULTIPLIERS = (-4658895280553007687, -7723592293110705685)
_STEP = -7046029254386353131


class Random(Policy):
    """Keeps a uniform random sample of all tokens seen, drawn per layer and KV head.

    A token's priority is a hash of seed, layer, head and position. So the sample depends neither on the batch that a
    row stands in nor on how often the memory was shrunk before, and no random state has to be saved.

    Args:
        seed: Another seed draws another sample.
        window: Newest rows that are never evicted.
        order: See `Policy`.
    """

    def __init__(self, seed: int = DEFAULT_SEED, window: int = 8, order: Order = "time") -> None:
        super().__init__(window, order)
        self.seed = seed

    def score(self, view: View, past: int, layer: Layer) -> torch.Tensor:
        """Priorities in [0, 1), float32."""
        positions = view.positions[..., :past]
        heads = torch.arange(positions.shape[1], device=positions.device)[None, :, None]
        layers = torch.as_tensor(layer, device=positions.device).reshape(-1, 1, 1)
        key = _mix(self.seed * 1_000_003 + layers)
        bits = _mix(_mix(key + heads) + positions)
        return ((bits >> 40) & 0xFFFFFF).float() / 2**24


def _mix(value: torch.Tensor) -> torch.Tensor:
    """SplitMix64: every input bit flips half of the output bits; int64 arithmetic wraps."""
    value = value + _STEP
    for shift, multiplier in zip((30, 27), _MULTIPLIERS):
        value = (value ^ ((value >> shift) & ((1 << (64 - shift)) - 1))) * multiplier
    return value ^ ((value >> 31) & ((1 << 33) - 1))
