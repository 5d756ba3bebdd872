"""Which similar neighbour of each key R-KV exempts, found tile by tile: memory linear in the number of keys.

Shapes: N independent heads, L keys, d head width, T rows or columns of a tile. Keys have unit length.
"""

import torch


def tile_size(device: torch.device) -> int:
    """Edge of a tile: fits the processor's cache, or keeps a GPU busy."""
    return 512 if device.type == "cpu" else 2048


def last_similar(unit: torch.Tensor, threshold: float) -> torch.Tensor:
    """The newest key, in storage order, whose cosine with each key exceeds the threshold.

    Columns are visited from the last tile to the first. Rows that have found their neighbour drop out, and the matrix
    is symmetric, so no pair of tiles is multiplied twice and most are never reached where keys are redundant.

    Args:
        unit: `[N, L, d]`.
        threshold: Cosine that counts as similar, above zero; the comparison is strict.

    Returns:
        `[N, L]` int64; 0 for keys without a similar one, as the original has it.
    """
    count, length, _ = unit.shape
    found = torch.full((count, length), -1, device=unit.device)
    tile = tile_size(unit.device)
    for start in reversed(range(0, length, tile)):
        block = slice(start, min(start + tile, length))
        _within(unit, found, block, threshold)
        if start == 0:
            break
        # Rows above that are still open come first; the closed ones matter to the open rows of this block only.
        is_open = found[:, :start] < 0
        rows = is_open.byte().argsort(dim=-1, descending=True, stable=True)
        width = int(is_open.sum(-1).max())
        below = torch.full_like(found[:, block], -1)
        for part in torch.split(rows[:, :width], tile, -1) if width else ():
            _across(unit, found, block, part, below, threshold)
        _upward(unit, found, block, rows[:, width:], below, threshold)
        found[:, block] = torch.where(found[:, block] < 0, below, found[:, block])
    return found.clamp_min(0)


def _within(unit: torch.Tensor, found: torch.Tensor, block: slice, threshold: float) -> None:
    """Neighbours inside one block of columns, for its own rows that are open."""
    tile = unit[:, block] @ unit[:, block].transpose(-1, -2)
    tile.diagonal(dim1=-2, dim2=-1).zero_()
    columns = torch.arange(block.start, block.stop, device=unit.device)
    last = _largest(tile, columns, threshold)
    found[:, block] = torch.where(found[:, block] < 0, last, found[:, block])


def _across(
    unit: torch.Tensor, found: torch.Tensor, block: slice, rows: torch.Tensor, below: torch.Tensor, threshold: float
) -> None:
    """Pairs of rows above the block and columns of it: settles the rows, and notes in `below` what columns find."""
    tile = _take(unit, rows) @ unit[:, block].transpose(-1, -2)
    columns = torch.arange(block.start, block.stop, device=unit.device)
    heads, at = (tile.amax(-1) > threshold).nonzero(as_tuple=True)
    if heads.numel():
        where = rows[heads, at]
        # A closed row that only fills up a ragged batch has found a later column already.
        found[heads, where] = torch.maximum(found[heads, where], _largest(tile[heads, at], columns, threshold))
    wanted = (tile.amax(-2) > threshold) & (found[:, block] < 0)
    heads, at = wanted.nonzero(as_tuple=True)
    if heads.numel():
        above = _largest(tile[heads, :, at], rows[heads], threshold)
        below[heads, at] = torch.maximum(below[heads, at], above)


def _upward(
    unit: torch.Tensor, found: torch.Tensor, block: slice, closed: torch.Tensor, below: torch.Tensor, threshold: float
) -> None:
    """Neighbours that the open rows of a block have among the closed rows above it."""
    is_open = found[:, block] < 0
    width = int(is_open.sum(-1).max())
    if width == 0 or closed.shape[-1] == 0:
        return
    local = is_open.byte().argsort(dim=-1, descending=True, stable=True)[:, :width]
    mine = _take(unit[:, block], local)
    best = below.gather(-1, local)
    for part in torch.split(closed, tile_size(unit.device), -1):
        tile = mine @ _take(unit, part).transpose(-1, -2)
        heads, at = (tile.amax(-1) > threshold).nonzero(as_tuple=True)
        if heads.numel():
            best[heads, at] = torch.maximum(best[heads, at], _largest(tile[heads, at], part[heads], threshold))
    below.scatter_(-1, local, best)


def _take(unit: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    return unit.gather(1, rows[..., None].expand(-1, -1, unit.shape[-1]))


def _largest(cosine: torch.Tensor, labels: torch.Tensor, threshold: float) -> torch.Tensor:
    """The largest label of an entry above the threshold in each row; -1 where there is none."""
    return torch.where(cosine > threshold, labels, -1).amax(-1)


def kth_similar(unit: torch.Tensor, threshold: float, kth: int) -> torch.Tensor:
    """The `kth` smallest entry of a row that holds j for similar keys j and 0 for all others (`first_percent`).

    Args:
        unit: `[N, L, d]`.
        threshold: Cosine that counts as similar.
        kth: Rank, from 1.

    Returns:
        `[N, L]` int64; 0 unless more than L - kth keys are similar to a key.
    """
    count, length, _ = unit.shape
    columns = torch.arange(length, device=unit.device)
    chosen = torch.zeros(count, length, dtype=torch.int64, device=unit.device)
    for rows in torch.split(columns, tile_size(unit.device)):
        heads = []
        for head in range(count):
            tile = unit[head, rows] @ unit[head].transpose(-1, -2)
            tile[torch.arange(len(rows), device=unit.device), rows] = 0
            heads.append(torch.where(tile > threshold, columns, 0).kthvalue(kth, dim=-1).values)
        chosen[:, rows] = torch.stack(heads)
    return chosen
