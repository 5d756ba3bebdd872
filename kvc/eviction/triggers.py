"""When to compress: small state machines, one decision per row after every forward."""

from abc import ABC, abstractmethod
from collections.abc import Collection

from kvc.errors import UserError
from kvc.generation.protocols import Progress


class Trigger(ABC):
    """Says after every forward which rows are to be compressed now.

    The first forward after `reset` is the prefill. Whether it compresses is `at_prefill`; the rule speaks from then on.

    Args:
        at_prefill: Compress the prompt as soon as it is in memory.
    """

    def __init__(self, at_prefill: bool = True) -> None:
        self.at_prefill = at_prefill
        self._started = False

    @property
    def characters(self) -> int:
        """Length of the decoded text that it reads; 0 for none."""
        return 0

    def bind(self, budget: int) -> None:  # noqa: B027 - most triggers do not look at it
        """Learn the budget of the eviction that it belongs to."""

    def room(self, cached: int) -> int | None:
        """Tokens that may come at most until the rule fires next.

        Args:
            cached: Rows in memory now, after the prefill or after the rule has fired.

        Returns:
            Their number, which does not grow with `cached`; None where nothing limits it.
        """
        return None

    def reset(self) -> None:
        """Forget everything: a new generate call begins."""
        self._started = False

    def __call__(self, progress: Progress) -> list[bool]:
        """Show the state after a forward.

        Args:
            progress: The rows, the same in number and order as before.

        Returns:
            Whether to compress each row before the next forward.
        """
        decisions = self.decide(progress, first=not self._started)
        if not self._started:
            self._started = True
            return [self.at_prefill] * len(progress.seen)
        return decisions

    @abstractmethod
    def decide(self, progress: Progress, first: bool) -> list[bool]:
        """Decide by the rule, and update its state.

        Args:
            progress: The rows.
            first: The forward was the prefill: state starts, the answer is not used.
        """


class PrefillOnly(Trigger):
    """Compresses the prompt and never again."""

    def decide(self, progress: Progress, first: bool) -> list[bool]:
        """Never."""
        return [False] * len(progress.seen)


class StepPhase(Trigger):
    """The rule of the original R-KV: when the tokens seen so far divide evenly, the next forward compresses.

    Args:
        divide_length: Tokens between compressions; the phase counts from the first token of the prompt.
        at_prefill: See `Trigger`.
    """

    def __init__(self, divide_length: int = 128, at_prefill: bool = True) -> None:
        super().__init__(at_prefill)
        self.divide_length = _positive("divide_length", divide_length)
        self._armed: list[bool] = []

    def room(self, cached: int) -> int:
        """One period of the phase."""
        return self.divide_length

    def decide(self, progress: Progress, first: bool) -> list[bool]:
        """Answer what the forward before announced."""
        now = [False] * len(progress.seen) if first else self._armed
        self._armed = [seen % self.divide_length == 0 for seen in progress.seen]
        return now


class EveryTokens(Trigger):
    """Every `interval` decoded tokens, whatever the length of the prompt.

    Args:
        interval: Tokens between compressions.
        at_prefill: See `Trigger`.
    """

    def __init__(self, interval: int = 128, at_prefill: bool = True) -> None:
        super().__init__(at_prefill)
        self.interval = _positive("interval", interval)
        self._start: list[int] = []

    def room(self, cached: int) -> int:
        """One interval."""
        return self.interval

    def decide(self, progress: Progress, first: bool) -> list[bool]:
        """By the number of tokens since the prefill."""
        if first:
            self._start = list(progress.seen)
        return [(seen - start) % self.interval == 0 for seen, start in zip(progress.seen, self._start)]


class BudgetBuffer(Trigger):
    """Whenever the memory of a row has outgrown its budget by a whole buffer.

    Args:
        buffer: Rows that may come on top of the budget.
        budget: Rows after a compression; null takes the budget of the eviction.
        at_prefill: See `Trigger`.
    """

    def __init__(self, buffer: int = 128, budget: int | None = None, at_prefill: bool = True) -> None:
        super().__init__(at_prefill)
        self.buffer = _positive("buffer", buffer)
        self.budget = budget if budget is None else _positive("budget", budget)

    def bind(self, budget: int) -> None:
        """Take the budget, unless there is one."""
        self.budget = budget if self.budget is None else self.budget

    def room(self, cached: int) -> int:
        """What is left of budget and buffer."""
        assert self.budget is not None, "the trigger belongs to no eviction yet"
        return max(1, self.budget + self.buffer - cached)

    def decide(self, progress: Progress, first: bool) -> list[bool]:
        """By the rows in memory."""
        assert self.budget is not None, "the trigger belongs to no eviction yet"
        return [cached >= self.budget + self.buffer for cached in progress.cached]


class NewlineIds(Trigger):
    """After a token that ends a line, by its id: the original's rule.

    The original looks at the most likely token, this at the one that was drawn: under greedy decoding the same.

    Args:
        newline_ids: Ids of the tokens that end a line.
        at_prefill: See `Trigger`.
    """

    def __init__(self, newline_ids: Collection[int], at_prefill: bool = True) -> None:
        super().__init__(at_prefill)
        if not newline_ids:
            raise UserError("newline_ids: must name at least one token")
        self.newline_ids = frozenset(newline_ids)

    def decide(self, progress: Progress, first: bool) -> list[bool]:
        """By the newest token."""
        return [token in self.newline_ids for token in progress.last_ids]


class NewlineText(Trigger):
    r"""When the decoded text comes to end with a marker, however it was cut into tokens.

    A run of line breaks or spaces after one counts once.

    Args:
        markers: Endings, `"\n"` by default.
        at_prefill: See `Trigger`.
    """

    def __init__(self, markers: Collection[str] = ("\n",), at_prefill: bool = True) -> None:
        super().__init__(at_prefill)
        if isinstance(markers, str) or not markers or not all(markers):
            raise UserError("markers: must be a list of texts that are not empty")
        self.markers = tuple(markers)
        self._inside: list[bool] = []

    @property
    def characters(self) -> int:
        """Room for the longest marker and the blanks that may follow it."""
        return max(map(len, self.markers)) + 16

    def decide(self, progress: Progress, first: bool) -> list[bool]:
        """By the end of the text."""
        tails = _tails(progress, "markers")
        before = [False] * len(tails) if first else self._inside
        self._inside = [tail.endswith(self.markers) or tail.rstrip(" \t").endswith(self.markers) for tail in tails]
        return [now and not earlier for now, earlier in zip(self._inside, before)]


class UntilThinkEnd(Trigger):
    """Another trigger until the row has closed its thoughts, nothing from then on.

    Args:
        inner: The trigger to follow until then.
        end_id: Token id of the end, or None to look for the text.
        end_text: Text of the end.
    """

    def __init__(self, inner: Trigger, end_id: int | None = None, end_text: str = "</think>") -> None:
        super().__init__(inner.at_prefill)
        self.inner = inner
        self.end_id = end_id
        self.end_text = end_text
        self._ended: list[bool] = []

    @property
    def characters(self) -> int:
        """What the inner trigger reads, and room for the end of the thoughts."""
        # One token may carry more text behind the end.
        return max(self.inner.characters, 0 if self.end_id is not None else len(self.end_text) + 64)

    def bind(self, budget: int) -> None:
        """Pass the budget on."""
        self.inner.bind(budget)

    def reset(self) -> None:
        """Forget everything, the inner trigger too."""
        super().reset()
        self.inner.reset()

    def decide(self, progress: Progress, first: bool) -> list[bool]:
        """By the inner trigger, for rows that have not ended."""
        wanted = self.inner(progress)
        if first:
            self._ended = [False] * len(progress.seen)
            return wanted
        if self.end_id is not None:
            now = [token == self.end_id for token in progress.last_ids]
        else:
            now = [self.end_text in tail for tail in _tails(progress, "end_text")]
        self._ended = [before or ends for before, ends in zip(self._ended, now)]
        return [want and not ended for want, ended in zip(wanted, self._ended)]


def _positive(name: str, value: int) -> int:
    if value < 1:
        raise UserError(f"{name}: must be at least 1, got {value}")
    return value


def _tails(progress: Progress, setting: str) -> list[str]:
    if progress.tails is None:
        raise UserError(f"{setting}: a trigger by text needs decoded text, and there is no tokenizer to decode with")
    return progress.tails
