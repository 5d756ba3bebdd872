"""How a collection gets on: a bar on a terminal, ten lines elsewhere."""

from types import TracebackType
from typing import TYPE_CHECKING, Self

from kvc.data.annotate.chat.outcome import Outcome
from kvc.data.annotate.chat.tally import Tally

if TYPE_CHECKING:
    from rich.console import Console

LINES = 10


class CollectionProgress:
    """Shows valid traces against wanted ones, time left, and the tally.

    Args:
        console: Where to write.
        tally: Counts, which this class keeps up to date.
        valid: Valid traces before the start.
        number: Valid traces wanted.
    """

    def __init__(self, console: "Console", tally: Tally, valid: int, number: int) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.console, self.tally, self.number = console, tally, number
        self._valid = valid
        columns = (
            *(TextColumn("valid"), MofNCompleteColumn(), BarColumn(20), TimeRemainingColumn(compact=True)),
            TextColumn("{task.description}", markup=False),
        )
        self._bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task = self._bar.add_task(tally.text(), total=number, completed=valid)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def __call__(self, outcome: Outcome) -> None:
        """Show one more outcome."""
        self.tally.add(outcome)
        before = self._valid
        self._valid += outcome.status == "valid"
        self._bar.update(self._task, completed=self._valid, description=self.tally.text())
        if not self.console.is_terminal and before * LINES // self.number != self._valid * LINES // self.number:
            line = f"{self._valid} of {self.number} valid; {self.tally.text()}"
            self.console.print(line, soft_wrap=True, markup=False, highlight=False)
