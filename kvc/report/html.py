"""The whole comparison as one HTML file that needs no network."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from kvc.report.folder import Finished
from kvc.report.grid import difference_grid, result_grid, seed_grid, settings_grid
from kvc.report.marks import Mark
from kvc.report.plots import Drawing, Plot
from kvc.report.render import as_svg, picture
from kvc.report.samples import Samples
from kvc.report.settings import differing
from kvc.report.table import mismatches, seed_groups

DARK = ("#5aa9ee", "#ff8d52", "#35c898", "#e6a3cb", "#f2b544", "#8ccff5", "#c893ff")
"""The palette on a dark page: the same hues, lighter."""


@dataclass(frozen=True)
class Page:
    """Everything that the page shows.

    Attributes:
        title: Heading of the page.
        runs: The runs.
        metrics: Metrics to show from the start.
        marks: How each run is drawn.
        drawing: The plots.
        samples: Sample outputs.
        when: Time of the comparison.
    """

    title: str
    runs: Sequence[Finished]
    metrics: Sequence[str]
    marks: Mapping[str, Mark]
    drawing: Drawing
    samples: Samples = field(default_factory=Samples)
    when: datetime = field(default_factory=lambda: datetime.now().astimezone())


def render(page: Page) -> str:
    """The HTML text.

    Everything that comes from a run is escaped by the template engine; only the plots, which matplotlib escapes, and
    the style and script of this package enter as they are.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("kvc.report", "page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    results = {run.label: run.result for run in page.runs}
    settings = differing(results)
    return environment.get_template("page.html").render(
        page=page,
        versions=page.runs[0].result.get("versions") or {},
        warnings=mismatches(results),
        results=result_grid(results, page.metrics, page.marks),
        differences=difference_grid(results, page.metrics, page.marks),
        seeds=seed_grid(seed_groups(results), page.metrics),
        settings=settings_grid(settings, list(results), page.marks),
        has_settings=bool(settings),
        quality=_svgs(page.drawing.quality, "quality"),
        curves=_svgs(page.drawing.curves, "curve"),
        pictures=_pictures(page.runs),
        provenance=[_provenance(run) for run in page.runs],
        dark=DARK,
    )


def _svgs(plots: Sequence[Plot], name: str) -> list[tuple[Plot, Any]]:
    from markupsafe import Markup

    # Matplotlib escapes what it writes into an SVG.
    return [
        (plot, Markup(as_svg(plot.figure, f"{name}{i}")) if plot.figure is not None else None)
        for i, plot in enumerate(plots)
    ]


def _pictures(runs: Sequence[Finished]) -> list[tuple[str, list[tuple[str, str | None]]]]:
    """Label of a run to the name and data of each of its pictures."""
    shown = []
    for run in runs:
        names = [name for name in run.result.get("pictures") or [] if isinstance(name, str)]
        # A result that names a file elsewhere gets nothing of it into the page.
        shown.append((run.label, [(n, picture(run.evaluation / n) if "/" not in n else None) for n in names]))
    return [(label, pictures) for label, pictures in shown if pictures]


def _provenance(run: Finished) -> dict[str, str]:
    """Where the numbers of a run come from."""
    result = run.result
    git, machine = result.get("git") or {}, result.get("machine") or {}
    versions, base = result.get("versions") or {}, result.get("base_model") or {}
    commit = str(git.get("commit", ""))[:10]
    gpus = machine.get("gpus") or []
    parts = {
        "folder": str(run.folder),
        "finished": datetime.fromtimestamp((run.folder / "result.json").stat().st_mtime).strftime("%Y-%m-%d %H:%M"),
        "commit": f"{commit} with changes" if commit and git.get("dirty") else commit,
        "base model": f"{base.get('name', '')} {base.get('hash', '')}",
        "data": str((result.get("data") or {}).get("hash", "")),
        "machine": ", ".join(map(str, gpus)) or f"{machine.get('processor', '')}, {machine.get('cpus', '?')} CPUs",
        "versions": ", ".join(f"{name} {number}" for name, number in versions.items()),
    }
    return {name: text.strip(" ,") for name, text in parts.items()}
