"""What a policy needs to know beside the rows: the last queries of every layer, and the attention that rows received.

Shapes: B batch, Hq query heads, Hk KV heads, G query heads per KV head, T new tokens, N slots, W window, D head width.
"""

import torch

from kvc.cache.positioned import PositionedCache
from kvc.cache.static import StaticMemory
from kvc.core.attention import Product

TILE = 256
"""Queries whose attention weights exist at a time."""


class Ring:
    """The last queries of one layer, in a buffer of fixed size.

    A decoding step overwrites the oldest query in place; nothing is copied until somebody asks for their order.

    Args:
        window: Queries to keep.
    """

    def __init__(self, window: int) -> None:
        self.window = window
        self._buffer: torch.Tensor | None = None
        self._count = 0
        self._slots: tuple[torch.Tensor, ...] = ()
        self._pushed: torch.Tensor | None = None
        self._absent: torch.Tensor | None = None

    def push(self, query: torch.Tensor, valid: torch.Tensor | None = None) -> None:
        """Add the queries of one forward.

        Args:
            query: `[B, Hq, T, D]`.
            valid: bool `[B, T]`, false for padding; None for no padding.
        """
        if valid is None and query.shape[2] == 1 and self._buffer is not None:
            if self._pushed is not None:
                self._buffer.index_copy_(2, self._pushed % self.window, query)
                self._pushed.add_(1)
                return
            self._buffer.index_copy_(2, self._slots[self._count % self.window], query)
            self._count += 1
            return
        past, absent = self.ordered(), self.absent()
        joined = query if past is None else torch.cat([past, query], dim=2)
        if valid is not None or absent is not None:
            # Padding between two turns must not push real queries out, so it goes to the front.
            real = torch.ones(len(joined), joined.shape[2], dtype=torch.bool, device=query.device)
            if valid is not None:
                real[:, -valid.shape[1] :] = valid
            if absent is not None:
                real &= torch.arange(joined.shape[2], device=query.device) >= absent[:, None]
            order = real.to(torch.int8).argsort(dim=1, stable=True)
            joined = joined.gather(2, order[:, None, :, None].expand_as(joined))
            self._absent = (min(joined.shape[2], self.window) - real.sum(1)).clamp(min=0)
        last = joined[:, :, -self.window :]
        batch, heads, count, width = last.shape
        self._buffer = torch.cat([last, last.new_zeros(batch, heads, self.window - count, width)], dim=2)
        self._slots = torch.arange(self.window, device=query.device)[:, None].unbind()
        self._count, self._pushed = count, None

    def count_on_device(self) -> None:
        """From now on how many there were is known to a tensor only, so that traced code holds for every step."""
        if self._buffer is not None:
            self._pushed = torch.full((1,), self._count, device=self._buffer.device)

    def ordered(self) -> torch.Tensor | None:
        """The queries in order of time, `[B, Hq, <= W, D]`; None before the first forward."""
        if self._buffer is None:
            return None
        pushed = self._count if self._pushed is None else int(self._pushed)
        if pushed <= self.window:
            return self._buffer[:, :, :pushed]
        return self._buffer.roll(-pushed, dims=2)

    def absent(self) -> torch.Tensor | None:
        """How many of the oldest queries of each row are padding, int64 `[B]`; None if there never was any."""
        if self._absent is None:
            return None
        # Steps overwrite the oldest once the buffer is full.
        pushed = self._count if self._pushed is None else int(self._pushed)
        return (self._absent - max(0, pushed - self.window)).clamp(min=0)

    def select(self, rows: torch.Tensor) -> None:
        """Only the given rows of the batch, in their order."""
        if self._buffer is not None:
            self._buffer = self._buffer[rows]
        if self._absent is not None:
            self._absent = self._absent[rows]


class Recorder:
    """A tap that notes queries and attention of every forward on one memory.

    Args:
        memory: The memory whose forwards are noted.
        window: Queries to keep of every layer; 0 keeps none.
        mass: Sum up the attention that every row receives; the sums lie in the layers (`Rows.mass`).
    """

    def __init__(self, memory: PositionedCache, window: int, mass: bool) -> None:
        self._memory: PositionedCache | StaticMemory = memory
        self._rings = [Ring(window) for _ in memory.layers] if window else None
        self._weigh = mass
        for layer in memory.layers if mass else []:
            layer.weigh()

    def follow(self, memory: PositionedCache | StaticMemory) -> None:
        """The rows have moved to this memory, whose forwards, perhaps traced ones, are noted from now on."""
        self._memory = memory
        for ring in self._rings or []:
            ring.count_on_device()

    def __call__(self, layer: int, product: Product) -> Product:
        """Note the product of one layer, and leave it as it is."""
        incoming = self._memory.incoming
        valid = incoming.positions >= 0 if incoming.padded else None
        if self._rings is not None:
            query, usual = product.query, product.query.shape[-1] ** -0.5
            query = query.detach() if query.requires_grad else query
            # Policies divide by the root of the head width; some models scale otherwise, or beforehand (OPT).
            query = query if product.scaling == usual else query * (product.scaling / usual)
            self._rings[layer].push(query, valid)
        if self._weigh:
            self._memory.layers[layer].receive(received(product, valid))
        return product

    def queries(self, layer: int) -> torch.Tensor | None:
        """The last queries of a layer `[B, Hq, <= W, D]`, scaled so that `q . k / sqrt(D)` are the model's logits."""
        return self._rings[layer].ordered() if self._rings is not None else None

    def absent(self) -> torch.Tensor | None:
        """How many of the oldest queries of each row are padding, int64 `[B]`; None for none, as in all layers."""
        return self._rings[0].absent() if self._rings else None

    def select(self, rows: torch.Tensor) -> None:
        """Only the given rows of the batch, in their order."""
        for ring in self._rings or []:
            ring.select(rows)


@torch.no_grad()
def received(product: Product, valid: torch.Tensor | None = None) -> torch.Tensor:
    """Attention that every key receives in one product, summed over queries and the query heads of its group.

    Args:
        product: The arguments of the product.
        valid: bool `[B, T]`, queries that count; None for all.

    Returns:
        float32 `[B, Hk, N]`.
    """
    query, key, mask = product.query, product.key, product.mask
    new, slots, kv_heads = query.shape[2], key.shape[2], key.shape[1]
    total = torch.zeros(key.shape[:3], device=key.device)
    columns = torch.arange(slots, device=key.device)
    for start in range(0, new, TILE):
        part = torch.unflatten(query[:, :, start : start + TILE], 1, (kv_heads, -1))
        size = part.shape[3]
        logits = (part.flatten(2, 3) @ key.transpose(-1, -2) * product.scaling).float()
        logits = torch.unflatten(logits, 2, (-1, size))
        if mask is not None:
            seen = mask[:, :, start : start + size]
            seen = torch.unflatten(seen, 1, (1 if seen.shape[1] == 1 else kv_heads, -1))
            # A row of padding sees nothing: a finite floor keeps its weights finite until they are left out.
            floor = torch.finfo(torch.float32).min
            logits = logits.masked_fill(~seen, floor) if seen.dtype == torch.bool else logits + seen.float()
        elif new > 1:
            last = torch.arange(start, start + size, device=key.device) + (slots - new)
            logits = logits.masked_fill(columns > last[:, None], -torch.inf)
        weights = logits.softmax(-1).sum(2)
        if valid is not None:
            weights = weights * valid[:, None, start : start + size, None]
        total += weights.sum(2)
    return total
