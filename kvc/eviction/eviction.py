"""Eviction while a model decodes: which rows stay (policy), how many (budget) and when (trigger).

    eviction = Eviction(RKV(), budget=512)
    generate(model, ids, compressor=eviction, max_new_tokens=4096)

Shapes: B batch, H KV heads, N slots, K kept slots.
"""

import copy
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from kvc.cache.layer import MemoryLayer
from kvc.cache.memory import KVMemory
from kvc.cache.static import StaticMemory
from kvc.cache.static_layer import StaticLayer
from kvc.core.attention import open_door
from kvc.errors import UserError
from kvc.eviction import debug
from kvc.eviction.budgets import pyramid, uniform
from kvc.eviction.capacity import slots
from kvc.eviction.policy import Policy, View
from kvc.eviction.recorder import Recorder
from kvc.eviction.triggers import BudgetBuffer, Trigger
from kvc.generation.protocols import Progress

TOGETHER = 64 * 2**20
"""Bytes of keys and values of layers that are rated in one go: small ones share a launch, large ones are not copied."""


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
        self._memory: KVMemory | StaticMemory | None = None
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
        return pyramid(self.budget, layers, self.beta, self.policy.least(self.prefix))

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

    def capacity(self) -> list[int] | None:
        """Slots that each layer needs at most from here on; None where nothing bounds them."""
        assert self._memory is not None, "begin() comes first"
        held = torch.stack([(layer.positions >= 0).sum(-1) for layer in self._memory.layers])
        return slots(held, self._budgets, self.trigger) if self.policy.evicts else None

    def follow(self, memory: StaticMemory) -> None:
        """The rows have moved to this memory; watch its forwards."""
        assert self._memory is not None, "begin() comes first"
        self._memory.tap, memory.tap = None, self._recorder
        self._memory = memory
        if self._recorder is not None:
            self._recorder.follow(memory)

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
        rows = [row for row, number in enumerate(alive) if number >= 0 and fires[number]]
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
        absent = self._recorder.absent() if self._recorder is not None else None
        if absent is None:
            return sorted(self._compress(rows, batch, 0))
        # After short prompts rows differ in how many queries there are to score with.
        parts: dict[int, list[int]] = {}
        counts = absent.tolist()
        for row in rows:
            parts.setdefault(counts[row], []).append(row)
        return sorted(set().union(*(self._compress(part, batch, skip) for skip, part in parts.items())))

    def _compress(self, rows: list[int], batch: int, skip: int) -> set[int]:
        """Evict from the given rows, whose oldest `skip` queries are padding."""
        assert self._memory is not None, "begin() comes first"
        memory = self._memory
        memory.settle()
        layers: Sequence[MemoryLayer | StaticLayer] = memory.layers
        shrunk: set[int] = set()
        at = torch.tensor(rows, device=layers[0].device)
        for group in self._groups(layers, len(rows)):
            before = layers[group[0]].length
            views = [self._view(number, layers[number], skip, at if len(rows) < batch else None) for number in group]
            view = views[0] if len(group) == 1 else View(*map(_stack, zip(*views)))  # type: ignore[arg-type]
            numbers = torch.tensor(group, device=at.device).repeat_interleave(len(rows))
            chosen = self.policy.select(view, self._budgets[group[0]], prefix=self.prefix, layer=numbers)
            lost = ((view.positions >= 0).sum(-1) > (chosen >= 0).sum(-1)).any(-1)
            shrunk.update(rows[row % len(rows)] for row in lost.nonzero()[:, 0].tolist())
            for number, indices in zip(group, chosen.chunk(len(group))):
                memory.evict(number, at, indices)
                debug.report(number, before, layers[number].length, int(memory.next_position.max()))
        return shrunk

    def _groups(self, layers: "Sequence[MemoryLayer | StaticLayer]", rows: int) -> list[list[int]]:
        """Layers that hold enough to evict from; those of the same size side by side, as far as a copy is cheap."""
        groups: list[list[int]] = []
        width = 0
        known: tuple[int, int] | None = None
        for number, (layer, budget) in enumerate(zip(layers, self._budgets)):
            if layer.length < budget:
                continue
            # Both tensors of one slot, in all heads.
            width = width or 2 * layer.keys[0, :, 0].nbytes
            size = (len(groups[-1]) + 1 if groups else 1) * rows * layer.length * width
            if known == (layer.length, budget) and size <= TOGETHER:
                groups[-1].append(number)
            else:
                groups.append([number])
            known = (layer.length, budget)
        return groups

    def _view(self, number: int, layer: "MemoryLayer | StaticLayer", skip: int, rows: torch.Tensor | None) -> View:
        """One layer, or only the given rows of its batch, without the oldest `skip` queries."""
        queries = self._recorder.queries(number) if self._recorder is not None else None
        queries = queries[:, :, skip:] if queries is not None and skip else queries
        view = View(layer.keys, layer.values, layer.positions, queries, layer.mass)
        return view if rows is None else View(*(None if part is None else part[rows] for part in view))  # type: ignore[arg-type]


def _stack(parts: "tuple[torch.Tensor | None, ...]") -> torch.Tensor | None:
    """The same part of several layers, one behind the other along the batch."""
    return None if parts[0] is None else torch.cat([part for part in parts if part is not None])
