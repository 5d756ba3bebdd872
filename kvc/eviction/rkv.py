"""R-KV: what is important and not redundant stays."""

import torch

from kvc.errors import UserError
from kvc.eviction.importance import check_kernel, past_importance
from kvc.eviction.policy import Layer, Order, Policy, View
from kvc.eviction.redundancy import Direction, redundancy


class RKV(Policy):
    """Keeps keys by importance minus redundancy (Cai et al. 2025).

    With `order=score` the kept indices and their order are those of the original, in half precision too: its roundings
    are followed one by one. With `order=time` pooling and "newest neighbour" keep acting on the order of time in later
    rounds, and half-precision keys are compared in float32.

    Args:
        mix_lambda: Weight of importance; redundancy weighs one minus it. The paper has 0.1, the released code 0.07.
        window: Last queries that score; their keys always stay.
        kernel_size: Width of the running maximum over importance, odd.
        retain_direction: Which similar neighbour does not make a key redundant, see `redundancy`.
        retain_ratio: Rank of `first_percent`, as a share of the length; no other direction reads it.
        projection: Width of a random projection for the search of neighbours; null searches exactly.
        order: See `Policy`.

    Raises:
        UserError: If a setting is out of range.
    """

    needs_queries = True

    def __init__(
        self,
        mix_lambda: float = 0.1,
        window: int = 8,
        kernel_size: int = 7,
        retain_direction: Direction = "last",
        retain_ratio: float = 0.1,
        projection: int | None = None,
        order: Order = "time",
    ) -> None:
        super().__init__(window, order)
        check_kernel(kernel_size)
        if not 0 <= mix_lambda <= 1:
            raise UserError(f"mix_lambda: must be in [0, 1], got {mix_lambda}")
        if not 0 <= retain_ratio <= 1:
            raise UserError(f"retain_ratio: must be in [0, 1], got {retain_ratio}")
        if retain_direction not in ("last", "first", "last_percent", "first_percent"):
            raise UserError(
                f"retain_direction: '{retain_direction}' is none of last, first, last_percent, first_percent"
            )
        if projection is not None and projection < 1:
            raise UserError(f"projection: must be at least 1, got {projection}")
        self.mix_lambda = mix_lambda
        self.kernel_size = kernel_size
        self.retain_direction: Direction = retain_direction
        self.retain_ratio = retain_ratio
        self.projection = projection

    def score(self, view: View, past: int, layer: Layer) -> torch.Tensor:
        """Weighted importance minus weighted redundancy."""
        assert view.queries is not None
        importance = past_importance(view.queries, view.keys, self.window, self.kernel_size)
        redundant = redundancy(
            view.keys,
            self.retain_direction,
            self.retain_ratio,
            rounded=self.order == "score",
            projection=self.projection,
        )
        return self.mix_lambda * importance - (1 - self.mix_lambda) * redundant[..., :past]
