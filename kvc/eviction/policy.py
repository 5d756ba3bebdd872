"""What a policy sees and answers, and what all policies share: padding, protected prefix, window, storage order.

Shapes: B rows, Hk KV heads, Hq query heads, L stored rows, W queries, d head width, K kept rows.
"""

from abc import ABC, abstractmethod
from typing import ClassVar, Literal, NamedTuple

import torch

from kvc.errors import UserError

Order = Literal["score", "time"]
Layer = int | torch.Tensor


class View(NamedTuple):
    """One layer of a KV memory.

    Attributes:
        keys: `[B, Hk, L, d]`, after RoPE.
        values: `[B, Hk, L, d]`.
        positions: `[B, Hk, L]` int64, the original position of every row; -1 marks an empty slot, and empty slots stand
            at the left end only.
        queries: `[B, Hq, W, d]`, the last W queries after RoPE, scaled so that q . k / sqrt(d) are the model's logits;
            the last belongs to the newest token.
        attention: `[B, Hk, L]`, the attention mass that every row has received so far.
    """

    keys: torch.Tensor
    values: torch.Tensor
    positions: torch.Tensor
    queries: torch.Tensor | None = None
    attention: torch.Tensor | None = None


class Policy(ABC):
    """Chooses the rows that stay; stateless, so one object serves all layers, batches and generate calls.

    The newest `window` rows always stay, and so does a protected prefix. Among the rest the highest scores stay. A
    left-padded row gets exactly the indices that it gets alone: rows of equal length are scored together, without their
    empty slots.

    Args:
        window: Newest rows that are never evicted; for policies that read queries also how many of them score.
        order: Storage order of the kept rows: `time` sorts them by position; `score` leaves them in descending order of
            score before the window, as the original R-KV stores them.

    Raises:
        UserError: If a setting is out of range.
    """

    evicts: ClassVar[bool] = True
    needs_queries: ClassVar[bool] = False
    needs_attention: ClassVar[bool] = False

    def __init__(self, window: int = 8, order: Order = "time") -> None:
        if window < 1:
            raise UserError(f"window: the newest token always stays, so it must be at least 1, got {window}")
        if order not in ("score", "time"):
            raise UserError(f"order: '{order}' is neither 'score' nor 'time'")
        self.window = window
        self.order = order

    @property
    def name(self) -> str:
        """Class name, for messages."""
        return type(self).__name__

    def recent(self, budget: int, prefix: int = 0) -> int:
        """Newest rows that stay at a budget: the window, unless the policy shares its budget otherwise."""
        return self.window

    def least(self, prefix: int = 0) -> int:
        """The smallest budget that leaves something to choose."""
        return self.window + prefix + 1

    def check(self, budget: int, prefix: int = 0) -> None:
        """Refuse a budget that the policy cannot work with.

        Args:
            budget: Rows per layer and KV head after an eviction.
            prefix: Tokens at the start that are never evicted.

        Raises:
            UserError: If nothing would be left to choose.
        """
        if prefix < 0:
            raise UserError(f"prefix: must not be negative, got {prefix}")
        if budget <= self.window + prefix:
            raise UserError(
                f"budget: {self.name} needs more than {self.window + prefix} tokens "
                f"(window {self.window} + prefix {prefix}), got {budget}"
            )

    def select(self, view: View, budget: int, *, prefix: int = 0, layer: Layer = 0) -> torch.Tensor:
        """Choose the rows that stay.

        Args:
            view: The layer.
            budget: Rows that stay per KV head, prefix and window included.
            prefix: Rows of positions below this one always stay.
            layer: Number of the layer; `[B]` where rows of several layers stand side by side.

        Returns:
            Indices `[B, Hk, K]` int64 into L with K <= budget, in the storage order of the shrunken memory, the window
            last; -1, at the left, where a row has fewer. Rows within the budget keep everything.

        Raises:
            UserError: If the budget is too small, or the policy lacks queries or attention.
        """
        self.check(budget, prefix)
        self._require(view)
        filled = (view.positions >= 0).sum(-1)
        length = view.positions.shape[-1]
        if bool((filled == length).all()):
            return self._choose(view, budget, prefix, layer)
        parts = []
        for count in sorted(set(filled.flatten().tolist())):
            if count > 0:
                for items, part in _dense(view, count):
                    own = layer if isinstance(layer, int) else layer[items[0]]
                    parts.append((items, self._choose(part, budget, prefix, own)))
        width = max((chosen.shape[-1] for _, chosen in parts), default=0)
        indices = torch.full((*filled.shape, width), -1, device=filled.device)
        for items, chosen in parts:
            count = int(filled[items].flatten()[0])
            flat = chosen.reshape(*filled[items].shape, chosen.shape[-1]) + (length - count)
            indices[items] = torch.nn.functional.pad(flat, (width - chosen.shape[-1], 0), value=-1)
        return indices

    @abstractmethod
    def score(self, view: View, past: int, layer: Layer) -> torch.Tensor:
        """Rate the rows before the window of a memory without empty slots.

        Args:
            view: The layer; every slot is filled.
            past: Rows 0..past-1 are to be rated.
            layer: Number of the layer, or `[B]`.

        Returns:
            Scores `[B, Hk, past]`; higher stays.
        """

    def _require(self, view: View) -> None:
        if self.needs_queries and view.queries is None:
            raise UserError(
                f"{self.name} scores keys by the last queries, and this attention records none: "
                "capture queries, or choose a policy that reads keys only (keydiff, knorm, streaming_llm)"
            )
        if self.needs_attention and view.attention is None:
            raise UserError(
                f"{self.name} scores keys by the attention they have received, and this attention records none: "
                "accumulate it, or choose another policy"
            )

    def _choose(self, view: View, budget: int, prefix: int, layer: Layer) -> torch.Tensor:
        """`select` without empty slots: `[B, Hk, min(L, budget)]`."""
        length = view.positions.shape[-1]
        everything = torch.arange(length, device=view.positions.device).expand(view.positions.shape)
        # The original reorders by score a memory that is exactly full.
        if length < budget or (length == budget and self.order == "time"):
            return everything
        past = length - self.recent(budget, prefix)
        scores = self.score(view, past, layer)
        positions = view.positions[..., :past]
        if prefix:
            scores = scores.masked_fill(positions < prefix, torch.inf)
        kept = scores.topk(budget - (length - past), dim=-1).indices
        if self.order == "time" or prefix:
            at = positions.gather(-1, kept)
            by = at if self.order == "time" else torch.where(at < prefix, at, prefix)
            kept = kept.gather(-1, by.argsort(dim=-1, stable=True))
        return torch.cat([kept, everything[..., past:]], dim=-1)


def _dense(view: View, count: int) -> list[tuple[tuple[torch.Tensor, ...], View]]:
    """The rows that hold `count` entries, cut to them: whole rows together, single heads of uneven rows apart.

    Returns:
        Pairs of an index into `[B, Hk]` and the view of it.
    """
    kv_heads, length = view.positions.shape[1:]
    same = (view.positions >= 0).sum(-1) == count
    whole = same.all(-1)
    parts: list[tuple[tuple[torch.Tensor, ...], View]] = []
    if bool(whole.any()):
        (rows,) = whole.nonzero(as_tuple=True)
        tensors = [None if t is None else t[rows] for t in view]
        parts.append(((rows,), _cut(tensors, length - count)))
    apart = same & ~whole[:, None]
    if bool(apart.any()):
        items = apart.nonzero(as_tuple=True)
        tensors = [None if t is None else t[items].unsqueeze(1) for t in (*view[:3], None, view.attention)]
        if view.queries is not None:
            tensors[3] = torch.unflatten(view.queries, 1, (kv_heads, -1))[items]
        parts.append((items, _cut(tensors, length - count)))
    return parts


def _cut(tensors: list[torch.Tensor | None], empty: int) -> View:
    keys, values, positions, queries, attention = tensors
    assert keys is not None
    assert values is not None
    assert positions is not None
    return View(
        keys[:, :, empty:],
        values[:, :, empty:],
        positions[:, :, empty:],
        queries,
        None if attention is None else attention[:, :, empty:],
    )
