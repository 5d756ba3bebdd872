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
        # Rows above that are still open come first.
        above = found[:, :start] < 0
        rows = above.byte().argsort(dim=-1, descending=True, stable=True)
        width = int(above.sum(-1).max()) if start else 0
        # Where most of the block is open, products serve rows and columns; else its few open rows look for themselves.
        mine = int((found[:, block] < 0).sum(-1).max())
        both = 2 * mine > block.stop - start
        below = torch.full_like(found[:, block], -1)
        for part in torch.split(rows[:, :width], tile, -1) if width else ():
            _across(unit, found, block, part, below if both else None, threshold)
        rest = rows[:, width:] if both else rows
        if mine and rest.shape[-1]:
            _upward(unit, found, block, rest, below, threshold)
        found[:, block] = torch.where(found[:, block] < 0, below, found[:, block])
    return found.clamp_min(0)


def _within(unit: torch.Tensor, found: torch.Tensor, block: slice, threshold: float) -> None:
    """Neighbours inside one block of columns, for its own rows that are open."""
    tile = unit[:, block] @ unit[:, block].transpose(-1, -2)
    tile.diagonal(dim1=-2, dim2=-1).zero_()
    heads, at = ((tile.amax(-1) > threshold) & (found[:, block] < 0)).nonzero(as_tuple=True)
    if heads.numel():
        found[heads, block.start + at] = _largest(tile[heads, at], _columns(block, unit), threshold)


def _across(
    unit: torch.Tensor,
    found: torch.Tensor,
    block: slice,
    rows: torch.Tensor,
    below: torch.Tensor | None,
    threshold: float,
) -> None:
    """Pairs of rows above the block and columns of it: settles the rows, and notes in `below` what columns find."""
    tile = _take(unit, rows) @ unit[:, block].transpose(-1, -2)
    heads, at = (tile.amax(-1) > threshold).nonzero(as_tuple=True)
    if heads.numel() == 0:
        return
    where = rows[heads, at]
    # A closed row that only fills up a ragged batch has found a later column already.
    newest = _largest(tile[heads, at], _columns(block, unit), threshold)
    found[heads, where] = torch.maximum(found[heads, where], newest)
    if below is not None:
        heads, at = ((tile.amax(-2) > threshold) & (found[:, block] < 0)).nonzero(as_tuple=True)
        if heads.numel():
            newest = _largest(tile[heads, :, at], rows[heads], threshold)
            below[heads, at] = torch.maximum(below[heads, at], newest)


def _upward(
    unit: torch.Tensor, found: torch.Tensor, block: slice, rows: torch.Tensor, below: torch.Tensor, threshold: float
) -> None:
    """Neighbours that the open rows of a block have among the given rows above it."""
    is_open = found[:, block] < 0
    order = is_open.byte().argsort(dim=-1, descending=True, stable=True)
    local = order[:, : int(is_open.sum(-1).max())]
    mine = _take(unit[:, block], local)
    best = below.gather(-1, local)
    for part in torch.split(rows, tile_size(unit.device), -1):
        tile = mine @ _take(unit, part).transpose(-1, -2)
        heads, at = (tile.amax(-1) > threshold).nonzero(as_tuple=True)
        if heads.numel():
            best[heads, at] = torch.maximum(best[heads, at], _largest(tile[heads, at], part[heads], threshold))
    below.scatter_(-1, local, best)


def _take(unit: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    return unit.gather(1, rows[..., None].expand(-1, -1, unit.shape[-1]))


def _columns(block: slice, unit: torch.Tensor) -> torch.Tensor:
    return torch.arange(block.start, block.stop, device=unit.device)


def _largest(cosine: torch.Tensor, labels: torch.Tensor, threshold: float) -> torch.Tensor:
    """The largest label of an entry above the threshold in each row; -1 where there is none."""
    # Labels are exact in float32 up to 2^24 keys, and compared four times as fast as in int64.
    return torch.where(cosine > threshold, labels.float(), -1.0).amax(-1).long()


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
