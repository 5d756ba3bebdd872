"""The rows of one layer: keys, values and the position of every kept row.

Shapes: B batch, H KV heads, N slots, D head dimension, T new tokens, K kept slots. Slots hold rows in the order in
which attention sees them; rows of a batch, and heads, may have different numbers of rows: the shorter ones begin
with empty slots (position -1, key and value zero), so the last slot of each row is its most recent token.

Every operation makes new tensors and leaves the old ones as they were, so that a memory can be forked for free,
gradients pass, and what was dropped is freed as soon as nobody else holds it.
"""

import copy
from typing import Self

import torch

from kvc.cache.codec import Codec, Parts

NOTES = 16
"""A decoding step only notes its position; so many notes are joined at a time, or when somebody asks."""
Span = tuple[int, int | None]
"""Slots from the first number up to, not including, the second (None: the end); negative ones count from the right."""


class Rows:
    """Rows of one layer.

    Args:
        codec: How rows are stored.
    """

    def __init__(self, codec: Codec) -> None:
        self.codec = codec
        self.weighed = False
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self.padded = False
        """Whether a slot may be empty."""
        self._loose = False
        self._tail: list[torch.Tensor] = []
        self._rows: tuple[Parts, Parts] | None = None
        self._seen: torch.Tensor | None = None
        self._counted: tuple[torch.Tensor, int] | None = None
        self._mass: torch.Tensor | None = None

    # What is stored

    @property
    def is_initialized(self) -> bool:
        """Whether anything was ever stored."""
        return self._rows is not None

    @property
    def rows(self) -> tuple[Parts, Parts]:
        """Keys and values in their stored form."""
        assert self._rows is not None, "the memory is empty: nothing was stored yet"
        return self._rows

    @property
    def keys(self) -> torch.Tensor:
        """Keys `[B, H, N, D]`, rotated to `positions`."""
        self.settle()
        return self.codec.decode(self.rows[0], self.dtype)

    @property
    def values(self) -> torch.Tensor:
        """Values `[B, H, N, D]`."""
        self.settle()
        return self.codec.decode(self.rows[1], self.dtype)

    @property
    def positions(self) -> torch.Tensor:
        """Position of every row, int64 `[B, H, N]`; -1 where the slot is empty."""
        self.settle()
        return self.seen.long().expand(-1, self.rows[0][0].shape[1], -1)

    @property
    def seen(self) -> torch.Tensor:
        """Positions as they are stored: int32 `[B, H, N]`, or `[B, 1, N]` while all heads hold the same rows."""
        assert self._seen is not None, "the memory is empty: nothing was stored yet"
        if self._tail:
            self._join_notes()
        return self._seen

    def _join_notes(self) -> None:
        assert self._seen is not None
        tail = torch.cat(self._tail, dim=1).to(torch.int32)[:, None]
        self._seen = torch.cat([self._seen, tail.expand(-1, self._seen.shape[1], -1)], dim=2)
        self._tail = []

    @property
    def length(self) -> int:
        """Number of slots, N."""
        self.settle()
        return self.rows[0][0].shape[2] if self._rows is not None else 0

    @property
    def batch_size(self) -> int:
        """Rows of the batch; no such attribute before something was stored."""
        if self._rows is None:
            raise AttributeError("batch_size")
        return self.rows[0][0].shape[0]

    @property
    def counts(self) -> torch.Tensor:
        """Number of rows in each row of the batch, `[B, H]`, or `[B, 1]` while all heads hold the same."""
        if self._counted is None:
            self._counted = ((self.seen >= 0).sum(-1), self.length)
        known, length = self._counted
        return known + (self.length - length)

    @property
    def mass(self) -> torch.Tensor | None:
        """Attention that every row has received since `weigh`, float32 `[B, H, N]`; None where nobody asked for it."""
        self.settle()
        return self._mass

    def weigh(self) -> None:
        """Keep a sum of attention beside every row from now on."""
        self.weighed = True
        if self._rows is not None and self._mass is None:
            self._mass = self._massless(self.rows[0][0].shape[2])

    def receive(self, attention: torch.Tensor) -> None:
        """Add the attention `[B, H, N]` that the slots of the running forward received."""
        assert self._mass is not None, "nobody asked for attention: call weigh() first"
        self._mass = self._mass + attention

    def _massless(self, slots: int) -> torch.Tensor:
        batch, heads = self.rows[0][0].shape[:2]
        return torch.zeros(batch, heads, slots, device=self.device)

    def tensors(self) -> list[torch.Tensor]:
        """Every tensor the layer keeps alive."""
        if self._rows is None:
            return []
        beside = [tensor for tensor in (self._seen, self._mass) if tensor is not None]
        return [*self.rows[0], *self.rows[1], *beside, *self._tail]

    def set(
        self,
        keys: Parts,
        values: Parts,
        seen: torch.Tensor,
        dtype: torch.dtype,
        padded: bool = True,
        mass: torch.Tensor | None = None,
    ) -> None:
        """Replace everything, in stored form.

        Args:
            keys: Stored keys.
            values: Stored values.
            seen: Positions `[B, H, N]` or `[B, 1, N]`.
            dtype: Of the rows when they are read.
            padded: Whether a slot may be empty; then empty slots are moved to the left end.
            mass: Attention received `[B, H, N]`, if it is kept; zero where it is not given.
        """
        self.dtype, self.device = dtype, keys[0].device
        self._rows, self._seen, self._tail = (keys, values), seen.to(torch.int32), []
        self._mass = (self._massless(keys[0].shape[2]) if mass is None else mass) if self.weighed else None
        self._counted, self.padded, self._loose = None, padded, padded
        self.settle()

    def fork(self) -> Self:
        """A layer of its own that shares the tensors."""
        other = copy.copy(self)
        other._tail = list(self._tail)
        return other

    # Operations

    def append(self, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor, padded: bool = True) -> None:
        """Add rows after the last slot.

        Args:
            keys: `[B, H, T, D]`, rotated to `positions`.
            values: `[B, H, T, D]`.
            positions: `[B, T]` or `[B, H, T]`; -1 where there is no row.
            padded: Whether `positions` may hold -1.
        """
        if padded:
            empty = (positions if positions.dim() == 3 else positions[:, None])[..., None] < 0
            keys, values = keys.masked_fill(empty, 0), values.masked_fill(empty, 0)
        if self._rows is None:
            self.dtype, self.device = keys.dtype, keys.device
        self.append_parts(self.codec.encode(keys), self.codec.encode(values), positions, padded)

    def append_parts(self, keys: Parts, values: Parts, positions: torch.Tensor, padded: bool) -> None:
        """Add rows that are in stored form already; see `append`."""
        flat = positions.dim() == 2
        if self._rows is None:
            self._rows, self._seen = (keys, values), (positions[:, None] if flat else positions).to(torch.int32)
        else:
            seen = None if flat else self.seen
            # Old keys go before new values come: at most one tensor of the layer exists twice.
            past_keys, past_values = self.rows
            self._rows = None
            all_keys = _join(past_keys, keys)
            del past_keys
            self._rows = all_keys, _join(past_values, values)
            if seen is None:
                self._tail.append(positions)
                if len(self._tail) == NOTES:
                    self._join_notes()
            else:
                heads = max(seen.shape[1], positions.shape[1])
                new = positions.to(torch.int32).expand(-1, heads, -1)
                self._seen = torch.cat([seen.expand(-1, heads, -1), new], dim=2)
        if self.weighed:
            new = self._massless(keys[0].shape[2])
            self._mass = new if self._mass is None else torch.cat([self._mass, new], dim=2)
        if padded:
            self.padded, self._loose, self._counted = True, True, None

    def extend(self, other: "Rows") -> None:
        """Add all rows of another layer, as they are stored if both store them alike, with the attention they have."""
        other.settle()
        if other.codec != self.codec:
            self.append(other.keys, other.values, other.seen, other.padded)
        else:
            if self._rows is None:
                self.dtype, self.device = other.dtype, other.device
            self.append_parts(*other.rows, other.seen, other.padded)
        if self._mass is not None and other._mass is not None:
            before = self._mass.shape[2] - other._mass.shape[2]
            self._mass = torch.cat([self._mass[..., :before], other._mass], dim=2)

    def keep(self, indices: torch.Tensor) -> None:
        """Keep only the given rows, and free the rest.

        Args:
            indices: Slots int64 `[B, H, K]` (or `[B, 1, K]`, the same for all heads) in their new order; -1 for none.
        """
        self.settle()
        self._gather(indices, padded=self.padded or bool((indices < 0).any()))

    def evict(self, batch: torch.Tensor, indices: torch.Tensor) -> None:
        """Keep only the given slots in some rows of the batch, everything in the others, and free what no row needs.

        Args:
            batch: Which rows of the batch, `[R]`.
            indices: Slots int64 `[R, H, K]` in their new order; -1 for none, at the left end only.
        """
        self.settle()
        others = torch.ones(self.batch_size, dtype=torch.bool, device=self.device)
        others[batch] = False
        size = max(indices.shape[-1], int((self.counts.amax(1) * others).max()))
        start = self.length - size
        where, none, first = indices.clamp(min=0), indices < 0, size - indices.shape[-1]

        def kept(part: torch.Tensor, empty: int) -> torch.Tensor:
            """A tensor `[B, H, N, ...]` with what stays; rows are copied once, chosen ones gathered."""
            tail = part.shape[3:]
            index = where[(...,) + (None,) * len(tail)].expand(*where.shape, *tail)
            chosen = part[batch].gather(2, index).masked_fill(none[(...,) + (None,) * len(tail)], empty)
            rest = part[:, :, start:].clone()
            rest[batch, :, :first] = empty
            rest[batch, :, first:] = chosen
            return rest

        heads = self.rows[0][0].shape[1]
        mass = None if self._mass is None else kept(self._mass, 0)
        seen = kept(self.seen.expand(-1, heads, -1), -1)
        keys, values = (tuple(kept(part, 0) for part in parts) for parts in self.rows)
        self.set(keys, values, seen, self.dtype, padded=False, mass=mass)
        self.padded = bool((seen[:, :, 0] < 0).any())

    def replace(
        self, span: Span, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor, padded: bool = True
    ) -> None:
        """Put other rows, of any number, in the place of a range of slots; see `append` for the tensors."""
        self.settle()
        new = Rows(self.codec)
        new.append(keys.to(self.dtype), values.to(self.dtype), positions, padded)
        self._splice([(*self._span(span), new)], self.padded or padded)

    def merge(self, source: Span, target: Span, weight: float | torch.Tensor) -> None:
        """Average rows into others and drop them: target := (1 - weight) * target + weight * source.

        A source k times as long as the target is first averaged over its k blocks. Keys are averaged as they are
        rotated. Into an empty slot the source goes whole; an empty source changes nothing. Target rows keep their
        positions, filled empty slots take those of the last source block.

        Args:
            source: Slots to merge and drop.
            target: Slots to merge into; must not overlap `source`.
            weight: Share of the source, one number or `[B]`: 1 / t for the t-th of a running mean, constant for an
                exponential moving average.

        Raises:
            ValueError: If the ranges overlap or their lengths do not fit.
        """
        self.settle()
        (start, stop), (first, last) = self._span(source), self._span(target)
        size = last - first
        if size == 0 or stop == start or (stop - start) % size:
            raise ValueError(f"merge: {stop - start} slots cannot be averaged into {size}")
        if start < last and first < stop:
            raise ValueError(f"merge: the slots {source} and {target} overlap")
        seen = self.seen
        old, blocks = seen[..., first:last], seen[..., start:stop].reshape(*seen.shape[:2], -1, size)
        held = (blocks >= 0).sum(2)
        share = torch.as_tensor(weight, dtype=torch.float32, device=seen.device).reshape(-1, 1, 1)
        share = torch.where(old < 0, 1.0, share).where(held > 0, 0.0)[..., None]
        merged = []
        for parts in self.rows:
            rows = self.codec.decode(parts, self.dtype).float()
            total = rows[:, :, start:stop].reshape(*rows.shape[:2], -1, size, rows.shape[-1]).sum(2)
            kept, mean = rows[:, :, first:last], total / held.clamp(min=1)[..., None]
            merged.append((kept + share * (mean - kept)).to(self.dtype))
        new = Rows(self.codec)
        new.append(merged[0], merged[1], torch.where(old < 0, blocks[:, :, -1], old), self.padded)
        self._splice([(start, stop, None), (first, last, new)], self.padded)

    def move(self, keys: torch.Tensor, positions: torch.Tensor) -> None:
        """Give every row, in place, another key and position (rotation); empty slots stay empty."""
        self.settle()
        self.set(self.codec.encode(keys), self.rows[1], positions, self.dtype, self.padded, self._mass)

    def select(self, batch: torch.Tensor) -> None:
        """Only the given rows of the batch, in their order; one may come several times."""
        keys, values = (tuple(part[batch] for part in parts) for parts in self.rows)
        self._rows, self._seen, self._counted = (keys, values), self.seen[batch], None
        self._mass = None if self._mass is None else self._mass[batch]
        # The longest row may be among those that are gone.
        self._loose = self.padded

    def drop(self, start: int, stop: int) -> None:
        """Drop slots [start, stop)."""
        self.settle()
        self._splice([(start, stop, None)], self.padded)

    # Inside

    def settle(self) -> None:
        """Move empty slots to the left end, and drop those that are empty in every row."""
        if not self._loose:
            return
        self._loose = False
        seen = self.seen
        filled = seen >= 0
        most = int(filled.sum(-1).max()) if seen.numel() else 0
        # Stable: the rows keep their order behind the empty slots.
        order = filled.to(torch.int8).argsort(dim=-1, stable=True)[..., seen.shape[-1] - most :]
        straight = torch.arange(seen.shape[-1] - most, seen.shape[-1], device=seen.device)
        if most < seen.shape[-1] or not torch.equal(order, straight.expand_as(order)):
            self._gather(order, padded=True)
        self.padded = bool((self.seen < 0).any())

    def _gather(self, indices: torch.Tensor, padded: bool) -> None:
        """Rows at `indices` `[B, H or 1, K]`, -1 for none."""
        where = indices.clamp(min=0)
        heads = max(self.seen.shape[1], indices.shape[1])
        seen = self.seen.expand(-1, heads, -1).gather(2, where.expand(-1, heads, -1))
        parts = []
        for stored in self.rows:
            kept = []
            for part in stored:
                index = where[..., None].expand(-1, part.shape[1], -1, part.shape[-1])
                part = part.gather(2, index)
                kept.append(part.masked_fill((indices < 0)[..., None], 0) if padded else part)
            parts.append(tuple(kept))
        seen = seen.masked_fill(indices < 0, -1) if padded else seen
        mass = self._mass
        if mass is not None:
            mass = mass.gather(2, where.expand(-1, mass.shape[1], -1)).masked_fill(indices < 0, 0)
        self.set(parts[0], parts[1], seen, self.dtype, padded, mass)

    def _splice(self, edits: "list[tuple[int, int, Rows | None]]", padded: bool) -> None:
        """Put the rows of other layers, or nothing, in the place of ranges that do not overlap."""
        pieces: list[tuple[Parts, Parts, torch.Tensor]] = []
        masses: list[torch.Tensor] = []
        begin = 0
        for start, stop, new in [*sorted(edits, key=lambda edit: edit[:2]), (self.length, self.length, None)]:
            keys, values = (tuple(part[:, :, begin:start] for part in parts) for parts in self.rows)
            pieces.append((keys, values, self.seen[..., begin:start]))
            if self._mass is not None:
                masses += [self._mass[..., begin:start], self._massless(new.length if new is not None else 0)]
            if new is not None:
                pieces.append((*new.rows, new.seen))
            begin = stop
        heads = max(seen.shape[1] for _, _, seen in pieces)
        keys, values = _join(*(piece[0] for piece in pieces)), _join(*(piece[1] for piece in pieces))
        seen = torch.cat([seen.expand(-1, heads, -1) for _, _, seen in pieces], dim=2)
        self.set(keys, values, seen, self.dtype, padded, torch.cat(masses, dim=2) if masses else None)

    def _span(self, span: Span) -> tuple[int, int]:
        """A range of slots with both ends counted from the left.

        Raises:
            ValueError: If it lies outside.
        """
        ends = (span[0], self.length if span[1] is None else span[1])
        start, stop = (end + self.length if end < 0 else end for end in ends)
        if not 0 <= start <= stop <= self.length:
            raise ValueError(f"slots {span} are not a range of the {self.length} there are")
        return start, stop


def _join(*pieces: Parts) -> Parts:
    return tuple(torch.cat(same, dim=2) for same in zip(*pieces))
