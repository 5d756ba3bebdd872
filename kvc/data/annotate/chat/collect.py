"""Ask until there are enough valid traces: draw from the pool, replace what fails, never ask for more than needed."""

import asyncio
from collections import Counter, deque
from collections.abc import Callable

from kvc.data.annotate.chat.annotator import ask
from kvc.data.annotate.chat.client import ChatClient
from kvc.data.annotate.chat.journal import Journal
from kvc.data.annotate.chat.outcome import Outcome, trace_of
from kvc.data.annotate.chat.pool import Item, Pool
from kvc.data.traces import Trace, validate
from kvc.errors import UserError

MAX_FAILED = 3


class Collection:
    """A growing set of valid traces.

    Questions are drawn in the order of the pool, and only as many at a time as valid traces are missing. So the set
    does not depend on which reply comes first: it is the shortest beginning of the pool with enough valid replies. When
    the pool is exhausted, questions without a valid reply are asked again.

    Args:
        pool: What may be asked.
        journal: Where outcomes are kept; those in it are not asked for again.
        model: Name of the model for the records.
        number: Valid traces wanted; at most all of the pool.
        again: How often a question may be asked again after an invalid reply.

    Attributes:
        valid: Traces by key.
    """

    def __init__(self, pool: Pool, journal: Journal, model: str, number: int | None = None, again: int = 1) -> None:
        self.pool, self.journal, self.model, self.again = pool, journal, model, again
        self.number = len(pool.items) if number is None else min(number, len(pool.items))
        self.valid: dict[str, Trace] = {}
        self._items = {item.key: item for item in pool.items}
        self._tries: Counter[str] = Counter()
        # A server that was down says nothing about a question: in a new session it counts as not asked, but comes last.
        self._failed_before = {outcome.key for outcome in journal.outcomes if outcome.status == "failed"}
        self._failed_in_a_row = 0
        for outcome in journal.outcomes:
            if outcome.status != "failed":
                self._count(outcome)

    def traces(self) -> list[Trace]:
        """Valid traces in the order of the pool, no more than wanted."""
        return [self.valid[item.key] for item in self.pool.items if item.key in self.valid][: self.number]

    async def run(self, client: ChatClient, concurrency: int, on_outcome: Callable[[Outcome], None]) -> None:
        """Ask until there are enough valid traces, or nothing is left to ask.

        Args:
            client: The server.
            concurrency: Largest number of questions in flight.
            on_outcome: Called after each outcome is in the journal.

        Raises:
            UserError: The server answers no question, or no longer; what was answered is in the journal.
        """
        order = sorted(self.pool.items, key=lambda item: item.key in self._failed_before)
        for turn in range(1 + self.again):
            waiting = deque(item for item in order if item.key not in self.valid and self._tries[item.key] <= turn)
            await self._turn(waiting, client, concurrency, on_outcome)

    async def _turn(
        self, waiting: deque[Item], client: ChatClient, concurrency: int, on_outcome: Callable[[Outcome], None]
    ) -> None:
        async def one(item: Item) -> None:
            outcome = await ask(client, item)
            self.journal.append(outcome)
            self._count(outcome)
            on_outcome(outcome)
            if self._failed_in_a_row >= MAX_FAILED:
                raise UserError(f"{MAX_FAILED} questions in a row got no answer: {outcome.message}")

        running: set[asyncio.Task[None]] = set()
        try:
            while True:
                while waiting and len(running) < min(concurrency, self.number - len(self.valid)):
                    running.add(asyncio.create_task(one(waiting.popleft())))
                if not running:
                    return
                done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                errors = [error for task in done if (error := task.exception()) is not None]
                if errors:
                    raise errors[0]
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)

    def _count(self, outcome: Outcome) -> None:
        item = self._items.get(outcome.key)
        if item is None:
            raise UserError(f"{self.journal.path}: holds a question that the input does not have ({outcome.key})")
        self._failed_in_a_row = self._failed_in_a_row + 1 if outcome.status == "failed" else 0
        trace = trace_of(item, outcome.text, self.model)
        # The text is judged again: what an earlier version of the checks let through is not valid now.
        if outcome.status == "valid" and not validate(trace):
            self.valid[item.key] = trace
        else:
            self._tries[item.key] += 1
