"""How a run looks in every plot and table: a colour and a marker of its own, told apart without colour vision."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

# Okabe and Ito's palette without its yellow and black, which vanish on white and on dark pages, and one of Tol's.
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#882255")
MARKERS = dict(zip("os^DvPX<>p*h", "●■▲◆▼✚✖◀▶⬟★⬢", strict=True))
"""Marker of matplotlib to the character that looks like it."""
INK, MUTED, GRID, ARM = "#1b1d21", "#646a73", "#dfe2e6", "#7b818a"
LONGEST = 44  # characters of a label in a legend


class Mark(NamedTuple):
    """How one run is drawn.

    Attributes:
        color: Its number in `PALETTE`.
        marker: Marker of matplotlib.
    """

    color: int
    marker: str

    @property
    def hex(self) -> str:
        """The colour, as `#rrggbb`."""
        return PALETTE[self.color]

    @property
    def symbol(self) -> str:
        """The marker as a character, for text."""
        return MARKERS[self.marker]


def marks_of(names: Sequence[str]) -> dict[str, Mark]:
    """A mark for each name: colours and markers go round with periods that share no factor (7 and 12)."""
    markers = list(MARKERS)
    return {name: Mark(i % len(PALETTE), markers[i % len(markers)]) for i, name in enumerate(names)}


def shorten(labels: Sequence[str]) -> list[str]:
    """Labels for a legend: the middle is left out where they are too long, and a number added where that hides all."""
    cut = [
        label if len(label) <= LONGEST else f"{label[: LONGEST // 2 - 1]}…{label[-LONGEST // 2 :]}" for label in labels
    ]
    alike = [label != short and cut.count(short) > 1 for label, short in zip(labels, cut)]
    cut = [f"{short} ({i + 1})" if same else short for i, (short, same) in enumerate(zip(cut, alike))]
    # Matplotlib leaves labels that begin with an underscore out of legends.
    return [f" {label}" if label.startswith("_") else label for label in cut]


@contextmanager
def style() -> Iterator[None]:
    """Settings of matplotlib for drawing and for saving, the same whatever the user has set."""
    import matplotlib as mpl

    settings: Any = {
        "font.family": "sans-serif",
        "font.sans-serif": ["DejaVu Sans"],
        "font.size": 9,
        "text.parse_math": False,  # a dollar sign in the name of a run is a dollar sign
        **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
        "axes.edgecolor": MUTED,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": GRID,
        "svg.fonttype": "none",
    }
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(settings)
        yield
