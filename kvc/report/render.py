"""Figures as SVG that follows the colours of a page, as PNG files, and pictures as data URIs."""

import base64
import io
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from kvc.report.marks import ARM, GRID, INK, MUTED, PALETTE, style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PNG_START = b"\x89PNG\r\n\x1a\n"


def as_svg(figure: "Figure", name: str) -> str:
    """A figure as an `<svg>` element whose colours are variables of the page: `--ink`, `--run-0` and so on.

    Args:
        figure: A figure in the colours of `kvc.report.marks`.
        name: Makes the ids inside unique on the page; letters and digits.
    """
    import matplotlib as mpl

    text = io.StringIO()
    with style():
        mpl.rcParams["svg.hashsalt"] = name
        figure.savefig(text, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    names = {INK: "ink", MUTED: "muted", GRID: "line", ARM: "arm"} | {c: f"run-{i}" for i, c in enumerate(PALETTE)}
    for color, variable in names.items():
        # Only as the value of a property: a run may be called like a colour.
        svg = re.sub(rf'((?:fill|stroke): ?){color}(?=[;"])', rf"\g<1>var(--{variable})", svg)
    svg = svg.replace("'DejaVu Sans'", "var(--font)")
    svg = re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", svg)
    return re.sub(r'(<[a-zA-Z]+(?: [^<>]*)? id=")', rf"\g<1>{name}-", svg)


def as_png(figure: "Figure") -> bytes:
    """A figure as a PNG on white, for a paper or a message."""
    data = io.BytesIO()
    with style():
        figure.savefig(data, format="png", dpi=220, facecolor="white", metadata={"Software": None})
    return data.getvalue()


def write_pngs(folder: Path, figures: "dict[str, Figure]") -> list[Path]:
    """Write each figure to a file named after it.

    Args:
        folder: Made if it is missing.
        figures: Name, such as `quality exact_match/passages`, to figure.

    Returns:
        The files.
    """
    from kvc.core.files import atomic

    written = []
    for name, path in zip(figures, file_names(figures)):
        with atomic(folder / path) as temporary:
            temporary.write_bytes(as_png(figures[name]))
        written.append(folder / path)
    return written


def file_names(names: Iterable[str]) -> list[str]:
    """A plain file name for each name: `quality_exact_match_passages.png`; a number where two would be the same."""
    taken: list[str] = []
    for name in names:
        stem = re.sub(r"\W+", "_", name).strip("_")
        number = sum(other == stem or other.startswith(f"{stem}~") for other in taken)
        taken.append(f"{stem}~{number + 1}" if number else stem)
    return [f"{stem.replace('~', '_')}.png" for stem in taken]


def picture(path: Path) -> str | None:
    """A PNG file as a data URI; None if it is missing or no PNG."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    return f"data:image/png;base64,{base64.b64encode(data).decode()}" if data.startswith(PNG_START) else None
