"""Views of random memories for the tests of eviction."""

import torch

from kvc.eviction.policy import View


def keys_like(kind: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Gaussian keys, or keys around a few centres so that many pairs have a cosine above one half."""
    draw = torch.Generator().manual_seed(seed)
    noise = torch.randn(shape, generator=draw)
    if kind == "gauss":
        return noise
    centres = torch.randn(*shape[:2], max(1, shape[2] // 12), shape[3], generator=draw)
    which = torch.randint(centres.shape[2], shape[:3], generator=draw)
    picked = centres.gather(2, which[..., None].expand(shape))
    return (picked + 0.5 * noise) * (0.5 + torch.rand(*shape[:3], 1, generator=draw))


def view(
    lengths: list[int] | list[list[int]],
    seed: int = 0,
    kv_heads: int = 2,
    group: int = 2,
    width: int = 8,
    window: int = 8,
) -> View:
    """A left-padded batch; entries of `lengths` are rows filled in a row, or in each of its heads."""
    per_head = [[n] * kv_heads if isinstance(n, int) else n for n in lengths]
    longest = max(max(row) for row in per_head)
    batch = len(per_head)
    draw = torch.Generator().manual_seed(seed)
    positions = torch.arange(longest) - (longest - torch.tensor(per_head)[..., None])
    positions = positions.clamp_min(-1)
    filled = (positions >= 0)[..., None]
    keys = keys_like("clustered", (batch, kv_heads, longest, width), seed) * filled
    values = torch.randn(keys.shape, generator=draw) * filled
    queries = torch.randn(batch, kv_heads * group, window, width, generator=draw)
    attention = torch.rand(batch, kv_heads, longest, generator=draw) * filled[..., 0]
    return View(keys, values, positions, queries, attention)


def row(batch: View, number: int) -> View:
    """One row of a batch, without the padding that all its heads share."""
    filled = int((batch.positions[number] >= 0).sum(-1).max())
    cut = batch.positions.shape[-1] - filled
    keys, values, positions, queries, attention = (t[number : number + 1] for t in batch)
    return View(keys[:, :, cut:], values[:, :, cut:], positions[:, :, cut:], queries, attention[:, :, cut:])
