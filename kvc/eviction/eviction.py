"""Eviction while a model decodes: which rows stay (policy), how many (budget) and when (trigger).

    eviction = Eviction(RKV(), budget=512)
    generate(model, ids, compressor=eviction, max_new_tokens=4096)

Shapes: B batch, H KV heads, N slots, K kept slots.
"""

import copy
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from kvc.cache.memory import KVMemory
from kvc.core.attention import open_door
from kvc.errors import UserError
from kvc.eviction import debug
from kvc.eviction.budgets import pyramid, uniform
from kvc.eviction.policy import Policy, View
from kvc.eviction.recorder import Recorder
from kvc.eviction.triggers import BudgetBuffer, Trigger
from kvc.generation.protocols import Progress


class Eviction:
    """A compressor for the decode loop that evicts rows of the memory.

    Rows of a batch are compressed independently, each when its own trigger fires.

    Args:
        policy: Which rows stay.
        budget: Rows per layer and KV head after a compression, or one number for each layer.
        trigger: When to compress; null waits for a buffer of 128 rows on top of the budget.
        prefix: Tokens at the start that are never evicted.
        beta: Share the budget out so that later layers get less, see `budgets.pyramid`; null gives all the same.

    Raises:
        UserError: If the budget leaves the policy nothing to choose, or the settings do not fit together.
    """

    def __init__(
        self,
        policy: Policy,
        budget: int | list[int],
        trigger: Trigger | None = None,
        prefix: int = 0,
        beta: float | None = None,
    ) -> None:
        if isinstance(budget, list) and (beta is not None or not budget):
            raise UserError("budget: a list of budgets must not be empty and leaves nothing for beta to share out")
        mean = budget if isinstance(budget, int) else round(sum(budget) / len(budget))
        policy.check(budget if isinstance(budget, int) else min(budget), prefix)
        self.policy = policy
        self.budget = budget
        self.prefix = prefix
        self.beta = beta
        # Triggers keep state, and the same object may have been given to several evictions.
        self.trigger = copy.deepcopy(trigger) if trigger is not None else BudgetBuffer()
        self.trigger.bind(mean)
        self._budgets: list[int] = []
        self._memory: KVMemory | None = None
        self._recorder: Recorder | None = None

    @property
    def characters(self) -> int:
        """Length of the decoded text that the trigger reads; 0 for none."""
        return self.trigger.characters

    def budgets(self, layers: int) -> list[int]:
        """The budget of every layer.

        Raises:
            UserError: If there is a list of another length.
        """
        if isinstance(self.budget, list):
            if len(self.budget) != layers:
                raise UserError(f"budget: {len(self.budget)} budgets do not fit the {layers} layers of the model")
            return self.budget
        if self.beta is None:
            return uniform(self.budget, layers)
        return pyramid(self.budget, layers, self.beta, self.policy.window + self.prefix + 1)

    def begin(self, model: PreTrainedModel, memory: KVMemory) -> None:
        """Forget an earlier call, and watch the forwards on this memory if the policy needs to.

        Raises:
            UserError: If the model's attention does not show what the policy needs.
        """
        self._budgets = self.budgets(len(memory.layers))
        self.trigger.reset()
        self._memory, self._recorder = memory, None
        if self.policy.needs_queries or self.policy.needs_attention:
            open_door(model)
            window = self.policy.window if self.policy.needs_queries else 0
            self._recorder = Recorder(memory, window, self.policy.needs_attention)
            memory.tap = self._recorder

    def end(self) -> None:
        """Watch no longer."""
        if self._memory is not None:
            self._memory.tap = None
        self._memory, self._recorder = None, None

    def select(self, rows: torch.Tensor) -> None:
        """The memory now has only these of its rows."""
        if self._recorder is not None:
            self._recorder.select(rows)

    def after(self, progress: Progress, alive: Sequence[int]) -> list[int]:
        """Compress the rows whose trigger fires; returns those that lost anything."""
        fires = self.trigger(progress)
        rows = [row for row, number in enumerate(alive) if fires[number]]
        shrunk = self.compress(rows, len(alive)) if rows else []
        return [alive[row] for row in shrunk]

    def compress(self, rows: list[int], batch: int) -> list[int]:
        """Evict from the given rows of the memory now.

        Args:
            rows: Which, in ascending order.
            batch: How many there are.

        Returns:
            Those that lost anything in any layer.
        """
        assert self._memory is not None, "begin() comes first"
        memory = self._memory
        memory.settle()
        shrunk: set[int] = set()
        for number, (layer, budget) in enumerate(zip(memory.layers, self._budgets)):
            before = layer.length
            if before < budget:
                continue
            positions = layer.positions
            at = torch.tensor(rows, device=positions.device)
            queries = self._recorder.queries(number) if self._recorder is not None else None
            view = View(layer.keys, layer.values, positions, queries, layer.mass)
            if len(rows) < batch:
                view = View(*(None if part is None else part[at] for part in view))  # type: ignore[arg-type]
            chosen = self.policy.select(view, budget, prefix=self.prefix, layer=number)
            lost = (view.positions >= 0).sum(-1) > (chosen >= 0).sum(-1)
            shrunk.update(rows[row] for row in lost.any(-1).nonzero()[:, 0].tolist())
            memory.evict(number, at, chosen)
            debug.report(number, before, layer.length, int(memory.next_position.max()))
        return sorted(shrunk)
