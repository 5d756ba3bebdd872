"""How many markers traces have, where they stand, and what they follow."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvc.data.annotate.categories import CATEGORIES, categorize
from kvc.data.traces import Trace

if TYPE_CHECKING:
    from rich.console import Console

BAR = 40  # characters of the longest bar
DECILES = 10


@dataclass
class MarkStatistics:
    """Counts over a set of traces.

    Attributes:
        traces: Number of traces.
        histogram: Number of traces by number of marks.
        categories: Number of marks by what precedes them.
        positions: Each mark's offset over the length of its trace, in (0, 1].
    """

    traces: int = 0
    histogram: Counter[int] = field(default_factory=Counter)
    categories: Counter[str] = field(default_factory=Counter)
    positions: list[float] = field(default_factory=list)

    @property
    def marks(self) -> int:
        """Number of marks in all traces."""
        return len(self.positions)

    @property
    def mean(self) -> float:
        """Marks per trace; 0 without traces."""
        return self.marks / self.traces if self.traces else 0.0


def mark_statistics(traces: Iterable[Trace]) -> MarkStatistics:
    """Count marks, categories and relative positions."""
    result = MarkStatistics()
    for trace in traces:
        text, marks = trace.text, trace.marks
        result.traces += 1
        result.histogram[len(marks)] += 1
        result.categories.update(categorize(text, mark) for mark in marks)
        result.positions += [mark / len(text) for mark in marks]
    return result


def _bar(count: int, largest: int) -> str:
    return "#" * round(BAR * count / largest) if largest else ""


def print_statistics(statistics: MarkStatistics, console: "Console") -> None:
    """Print the histogram, the categories and the deciles of positions as tables."""
    from rich.table import Table

    console.print(f"{statistics.traces} traces, {statistics.marks} COMP, {statistics.mean:.2f} per trace")
    histogram = Table("COMP", "traces", "", title="COMP per trace", title_justify="left")
    largest = max(statistics.histogram.values(), default=0)
    for marks in range(min(statistics.histogram, default=0), max(statistics.histogram, default=-1) + 1):
        count = statistics.histogram[marks]
        histogram.add_row(str(marks), str(count), _bar(count, largest))
    console.print(histogram)
    categories = Table("category", "COMP", "share", title="What a COMP follows", title_justify="left")
    for category in CATEGORIES:
        count = statistics.categories[category]
        categories.add_row(category, str(count), f"{count / max(1, statistics.marks):.1%}")
    console.print(categories)
    positions = Table("part of the trace", "COMP", "", title="Where a COMP stands", title_justify="left")
    deciles = Counter(min(DECILES - 1, int(position * DECILES)) for position in statistics.positions)
    for decile in range(DECILES):
        count = deciles[decile]
        positions.add_row(
            f"{decile * 10}-{decile * 10 + 10} %", str(count), _bar(count, max(deciles.values(), default=0))
        )
    console.print(positions)
