"""Who may see whom in a batch with memory tokens: one description, a dense mask and a block mask from it.

A sequence is cut into segments; each ends with a run of n memory tokens (slots 0..n-1), and what follows the last run
is the tail. Inside its segment a token sees everything before it. Beyond, the kind decides which columns reach which
later segments, as an interval of segments for every column. So both masks are the same two comparisons of integers.

Merged memories are rows of no token: columns before those of the sequence. Slot k of run r is column r * n + k.

Shapes: B batch, T tokens, M columns of merged memory, S = M + T columns.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from kvc.core.attention import kernel_of
from kvc.errors import UserError

Kind = Literal[
    "full", "no_context", "concat", "concat_recur", "merge", "merge_recur", "gist", "pos_control", "neg_control"
]
Reach = tuple[torch.Tensor, torch.Tensor]
"""First and last segment, inclusive, whose tokens see a column from outside its own segment; int32 `[B, columns]`."""

FOREVER = 2**30
PADDING = -1
"""Segment of padding: it sees padding only, so that no row of a mask is empty, and nothing sees it."""
NOWHERE = -2
"""Home of a merged memory: no token lives there."""


@dataclass(frozen=True)
class Layout:
    """What each place of a batch holds.

    Args:
        slot: int `[B, T]`, the slot of a memory token in its run, -1 for an ordinary token.
        valid: bool `[B, T]`, False for padding, which may be on either side.
        slots: Memory tokens in a run, n.
        kept: bool `[B, T]`, ordinary tokens that stay visible for good (attention sink, prompt); None for none.
        cut: bool `[B, T]`, ordinary tokens that end a segment without a run, for kinds that need no memory tokens; None
            for none.
    """

    slot: torch.Tensor
    valid: torch.Tensor
    slots: int
    kept: torch.Tensor | None = None
    cut: torch.Tensor | None = None

    @cached_property
    def memory(self) -> torch.Tensor:
        """Memory tokens, bool `[B, T]`."""
        return (self.slot >= 0) & self.valid

    @cached_property
    def _ends(self) -> torch.Tensor:
        ends = (self.slot == self.slots - 1) & self.memory
        return ends if self.cut is None else ends | (self.cut & self.valid)

    @cached_property
    def segment(self) -> torch.Tensor:
        """Number of segments that end before each token, int32 `[B, T]`; `PADDING` for padding."""
        before = self._ends.cumsum(-1) - self._ends.long()
        return before.masked_fill(~self.valid, PADDING).int()

    @cached_property
    def runs(self) -> torch.Tensor:
        """Number of segments that end, which is the segment of the tail, int32 `[B, 1]`."""
        return self._ends.sum(-1, keepdim=True).int()

    @cached_property
    def most_runs(self) -> int:
        """Largest number of runs in a row; waits for the device."""
        return int(self.runs.max()) if self.runs.numel() else 0

    @cached_property
    def places(self) -> torch.Tensor:
        """Where each memory token stands, int64 `[B, most_runs * n]` by run and slot; 0 for runs that a row lacks."""
        places = self.slot.new_zeros(len(self.slot), self.most_runs * self.slots, dtype=torch.int64)
        batch, token = self.memory.nonzero(as_tuple=True)
        places[batch, self.segment[batch, token] * self.slots + self.slot[batch, token]] = token
        return places

    def check(self) -> None:
        """Refuse runs with a slot missing; waits for the device.

        Raises:
            UserError: If memory tokens do not stand in complete runs of n.
        """
        slot = self.slot.masked_fill(~self.valid, -1)
        edge = slot.new_full((len(slot), 1), -1)
        before, after = torch.cat([edge, slot[:, :-1]], dim=1), torch.cat([slot[:, 1:], edge], dim=1)
        orphan = (slot > 0) & (before != slot - 1)
        cut = (slot >= 0) & (slot < self.slots - 1) & (after != slot + 1)
        bad = (orphan | cut | (slot >= self.slots)).nonzero()
        if len(bad):
            row, token = bad[0].tolist()
            raise UserError(
                f"input_ids: row {row} has an incomplete run of memory tokens at token {token}, each run must be all "
                f"{self.slots} of them in order"
            )


@dataclass(frozen=True)
class Visibility:
    """Token i sees column j if j is not later, and i is in the segment of j or in one that j reaches.

    Args:
        segment: Segment of each token, int32 `[B, T]`.
        home: Segment of each column, int32 `[B, S]`.
        first: First other segment that sees the column, int32 `[B, S]`.
        last: The last one.
    """

    segment: torch.Tensor
    home: torch.Tensor
    first: torch.Tensor
    last: torch.Tensor

    @property
    def columns(self) -> int:
        """Columns of merged memory before those of the sequence, M."""
        return self.home.shape[1] - self.segment.shape[1]

    def dense(self) -> torch.Tensor:
        """Mask for scaled dot-product attention, bool `[B, 1, T, S]`."""
        size, total = self.segment.shape[1], self.home.shape[1]
        order = torch.ones(size, total, dtype=torch.bool, device=self.segment.device).tril(total - size)
        segment = self.segment[:, :, None]
        reached = (self.first[:, None] <= segment) & (segment <= self.last[:, None])
        return (((segment == self.home[:, None]) | reached) & order)[:, None]

    def additive(self, dtype: torch.dtype) -> torch.Tensor:
        """The same for eager attention, which adds it to the scores: 0 or the smallest number, `[B, 1, T, S]`."""
        visible = self.dense()
        return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(
            ~visible, torch.finfo(dtype).min
        )

    def rule(self) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
        """The same as a `mask_mod` of FlexAttention."""
        segment, home, first, last, columns = self.segment, self.home, self.first, self.last, self.columns

        def mask_mod(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
            own = segment[b, q]
            reached = (first[b, kv] <= own) & (own <= last[b, kv])
            return (kv - columns <= q) & ((own == home[b, kv]) | reached)

        return mask_mod

    def block(self, size: int = 128, compiled: bool = False) -> BlockMask:
        """Block mask of FlexAttention.

        Args:
            size: Tokens and columns of a block.
            compiled: Compile the construction, which then never holds a dense mask (GPU).
        """
        batch, tokens = self.segment.shape
        return create_block_mask(
            self.rule(), batch, None, tokens, self.home.shape[1], self.segment.device, size, _compile=compiled
        )

    def form(self, attention: str, dtype: torch.dtype) -> torch.Tensor | BlockMask:
        """The mask as a kernel takes it.

        Args:
            attention: Attention implementation of the model.
            dtype: Of the hidden states.

        Raises:
            UserError: If the kernel takes none that can say this.
        """
        kernel = kernel_of(attention)
        if kernel == "sdpa":
            return self.dense()
        if kernel == "eager":
            return self.additive(dtype)
        if kernel == "flex_attention":
            return self.block(compiled=self.segment.is_cuda)
        raise UserError(f"backbone.attn_implementation: {kernel} takes no such mask, use sdpa, eager or flex_attention")


def visibility(layout: Layout, kind: Kind) -> Visibility:
    """Describe who may see whom.

    | kind | what a token sees of earlier segments |
    |---|---|
    | `full`, `pos_control` | everything |
    | `no_context`, `neg_control` | nothing; as the negative control of gist the tail sees the tail |
    | `concat_recur` | all memory tokens |
    | `concat` | nothing while segments are compressed; the tail sees all memory tokens |
    | `gist` | memory tokens of the segment right before |
    | `merge_recur` | the merged memory of all earlier runs, in n columns for each run |
    | `merge` | nothing while segments are compressed; the tail sees the merge of all runs, in n columns |

    Kept tokens are always visible.

    Args:
        layout: What each place holds.
        kind: The rule.

    Returns:
        The description; only the merge kinds have columns of merged memory.

    Raises:
        UserError: If there is no such kind.
    """
    if kind not in _TOKENS:
        raise UserError(f"kind: '{kind}' is not one of {', '.join(get_args(Kind))}")
    home = layout.segment
    first, last = _TOKENS[kind](layout)
    if layout.kept is not None:
        kept = layout.kept & layout.valid
        first, last = torch.where(kept, home, first), last.masked_fill(kept, FOREVER)
    first, last = first.masked_fill(~layout.valid, FOREVER), last.masked_fill(~layout.valid, NOWHERE)
    if kind in _MERGED:
        merged = _MERGED[kind](layout)
        first, last = torch.cat([merged[0], first], dim=1), torch.cat([merged[1], last], dim=1)
        home = torch.cat([torch.full_like(merged[0], NOWHERE), home], dim=1)
    return Visibility(layout.segment, home, first, last)


def is_merged(kind: Kind) -> bool:
    """Whether the kind needs columns of merged memory."""
    return kind in _MERGED


def _nobody(layout: Layout) -> Reach:
    return torch.full_like(layout.segment, FOREVER), torch.full_like(layout.segment, NOWHERE)


def _everybody(layout: Layout) -> Reach:
    return torch.zeros_like(layout.segment), torch.full_like(layout.segment, FOREVER)


def _memory_only(layout: Layout, first: torch.Tensor, last: torch.Tensor | int) -> Reach:
    none = _nobody(layout)
    return torch.where(layout.memory, first, none[0]), torch.where(layout.memory, last, none[1])


def _concat_recur(layout: Layout) -> Reach:
    return _memory_only(layout, layout.segment, FOREVER)


def _concat(layout: Layout) -> Reach:
    return _memory_only(layout, layout.runs, FOREVER)


def _gist(layout: Layout) -> Reach:
    return _memory_only(layout, layout.segment + 1, layout.segment + 1)


def _merged_so_far(layout: Layout) -> Reach:
    run = torch.arange(layout.most_runs, dtype=torch.int32, device=layout.slot.device)
    following = (run + 1).repeat_interleave(layout.slots).expand(len(layout.slot), -1)
    return following, following


def _merged_at_the_end(layout: Layout) -> Reach:
    # A row without any run has nothing to merge.
    tail = layout.runs.masked_fill(layout.runs == 0, FOREVER).expand(-1, layout.slots)
    return tail, tail


_TOKENS: dict[Kind, Callable[[Layout], Reach]] = {
    "full": _everybody,
    "pos_control": _everybody,
    "no_context": _nobody,
    "neg_control": _nobody,
    "concat": _concat,
    "concat_recur": _concat_recur,
    "merge": _nobody,
    "merge_recur": _nobody,
    "gist": _gist,
}
_MERGED: dict[Kind, Callable[[Layout], Reach]] = {"merge": _merged_at_the_end, "merge_recur": _merged_so_far}
