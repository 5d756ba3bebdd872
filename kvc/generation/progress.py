"""A progress bar for one decode."""

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from rich.console import Console


class DecodeProgress:
    """Shows how far a decode is, what its memory holds, how fast it runs, and how long it takes at most.

    Nothing is shown where the console is no terminal; a console with `force_terminal=True` shows it anywhere.

    Args:
        total: Most new tokens of a row.
        rows: Rows of the batch.
        console: Where to draw; null takes standard error, so that standard output holds only text.
        enabled: False shows nothing.
    """

    def __init__(self, total: int, rows: int, console: "Console | None" = None, enabled: bool = True) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        console = console or Console(stderr=True)
        self.rows, self.shown = rows, enabled and console.is_terminal
        columns = (
            *(TextColumn("tokens"), MofNCompleteColumn(), BarColumn(20), TimeRemainingColumn(compact=True)),
            TextColumn("{task.description}", markup=False),
        )
        # Lines printed to the same terminal go above the bar; output into a file or pipe must stay there.
        self._bar = Progress(
            *columns,
            console=console,
            transient=True,
            redirect_stdout=sys.stdout.isatty(),
            disable=not self.shown,
        )
        self._task = self._bar.add_task("prompt", total=total)
        self._begun: float | None = None
        self._tokens = 0

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def step(self, new_tokens: int, alive: int, cached: int, compressions: int) -> None:
        """Show one more step, in which every live row got one token.

        Args:
            new_tokens: Tokens that this step added, over all rows.
            alive: Rows that go on after this step.
            cached: Tokens in the memory of the longest row, the unit of a budget.
            compressions: Compressions of all rows since the start.
        """
        if not self.shown:
            return
        text = f"{self.rows - alive} of {self.rows} rows finished, {cached:,} tokens in memory"
        text += f", {compressions} compressions, {self._rate(new_tokens)}"
        self._bar.update(self._task, advance=1, description=text)

    def _rate(self, new_tokens: int) -> str:
        """Tokens per second, without the first step: its tokens come from the prompt's forward."""
        now = time.monotonic()
        if self._begun is None:
            self._begun = now
            return "- tokens/s"
        self._tokens += new_tokens
        return f"{self._tokens / max(now - self._begun, 1e-9):,.0f} tokens/s"
