"""`python -m kvc compare`: finished runs as tables, CSV and JSON, and as a page, plots and TensorBoard."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvc.commands import CommandParser
from kvc.errors import UserError

if TYPE_CHECKING:
    from kvc.report.folder import Finished

EPILOG = """\
examples:
  python -m kvc compare runs/first
  python -m kvc compare runs/first runs/second runs/third
  python -m kvc compare runs/first/eval/test runs/first/eval/other
  python -m kvc compare runs/* --metric exact_match --csv table.csv
  python -m kvc compare runs/* --html report.html             (one file: tables, plots, samples; no network)
  python -m kvc compare runs/* --html report.html --x kv_bytes_peak --samples 10
  python -m kvc compare runs/* --png plots --tensorboard tb   (then: tensorboard --logdir tb)

The table shows the key metrics; CSV (one number a line) and JSON hold all.
Runs that differ only in the seed are also averaged.
"""
WRITTEN = ("compare.csv", "compare.json")


def parser() -> argparse.ArgumentParser:
    """Arguments of the command."""
    result = CommandParser(
        prog="python -m kvc compare",
        description="Compare finished runs, their baselines and paired differences.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument("runs", metavar="RUN", nargs="+", help="run folder, or evaluation folder RUN/eval/NAME")
    result.add_argument(
        "--metric", metavar="NAME", nargs="+", action="extend", help="metrics to show; default: the key metrics"
    )
    result.add_argument("--csv", metavar="FILE", help="default: compare.csv in the run, or in the runs' common folder")
    result.add_argument("--json", metavar="FILE", help="default: compare.json there")
    pictures = result.add_argument_group("pictures")
    pictures.add_argument("--html", metavar="FILE", help="write everything as one page that needs no network")
    pictures.add_argument("--png", metavar="FOLDER", help="write the plots")
    pictures.add_argument(
        "--tensorboard", metavar="FOLDER", help="write HParams of all runs, their curves and the plots"
    )
    pictures.add_argument(
        "--x",
        metavar="NAME",
        help="cost on the horizontal axis: a metric, its part before the /, or a size or time; "
        "default: bytes of KV, else tokens kept, else trainable parameters, else training time",
    )
    pictures.add_argument("--samples", metavar="N", type=int, help="samples shown side by side on the page; default: 5")
    pictures.add_argument("--title", metavar="TEXT", help="heading of the page")
    return result


def main(argv: list[str]) -> int:
    """Print the tables and write the files.

    Args:
        argv: Arguments after `compare`.

    Returns:
        Exit code.
    """
    options = parser().parse_args(argv)
    from rich.console import Console

    from kvc.core.files import write_json, write_text
    from kvc.report.folder import common_folder, read_runs
    from kvc.report.numbers import as_csv, as_json
    from kvc.report.table import show

    _check(options)
    folders = [path for path in map(Path, options.runs) if not _ours(path, options)]
    if not folders:
        raise UserError(f"{options.runs[0]} is not a run folder")
    runs = read_runs(folders)
    results = {run.label: run.result for run in runs}
    labels = {run.label: run.folder for run in runs}
    known = {name for result in results.values() for name in [*result["metrics"], *result.get("differences", {})]}
    for name in options.metric or []:
        if name not in known:
            raise UserError(f"--metric {name}: no run has it; there are {', '.join(sorted(known))}")
    csv_path = Path(options.csv) if options.csv else common_folder(folders) / WRITTEN[0]
    json_path = Path(options.json) if options.json else common_folder(folders) / WRITTEN[1]
    pictures = Pictures(runs, options) if options.html or options.png or options.tensorboard else None
    show(results, options.metric, Console())
    try:
        write_text(csv_path, as_csv(results, labels))
        write_json(json_path, as_json(results, labels))
    except OSError as error:
        raise UserError(f"cannot write {csv_path} and {json_path}: {error.strerror}") from error
    print(f"wrote {csv_path} and {json_path}")
    if pictures:
        pictures.write()
    return 0


class Pictures:
    """The page, the plots and the folder for TensorBoard: drawn first, written when all of it is there.

    Args:
        runs: The runs.
        options: Options of the command.
    """

    def __init__(self, runs: "list[Finished]", options: argparse.Namespace) -> None:
        from kvc.report.marks import marks_of
        from kvc.report.plots import draw
        from kvc.report.table import key_metrics

        self.runs, self.options = runs, options
        self.metrics = options.metric or key_metrics(run.result for run in runs)
        self.marks = marks_of([run.label for run in runs])
        self.drawing = draw(runs, self.metrics, self.marks, options.x)
        self.page = self._page() if options.html else ""

    def _page(self) -> str:
        from kvc.report.html import Page, render
        from kvc.report.samples import read_samples

        count = 5 if self.options.samples is None else self.options.samples
        names = ", ".join(run.label for run in self.runs) if len(self.runs) <= 3 else f"{len(self.runs)} runs"
        title = self.options.title or f"Comparison of {names}"
        samples = read_samples(self.runs, count)
        return render(Page(title, self.runs, self.metrics, self.marks, self.drawing, samples))

    def write(self) -> None:
        """Write what was asked for.

        Raises:
            UserError: If a place cannot be written to.
        """
        from kvc.core.files import write_text
        from kvc.report.render import write_pngs
        from kvc.report.tensorboard import write_tensorboard

        options = self.options
        try:
            if options.html:
                write_text(options.html, self.page)
                print(f"wrote {options.html} ({len(self.page.encode()) / 1e6:.1f} MB)")
            if options.png:
                count = len(write_pngs(Path(options.png), self.drawing.figures))
                print(f"wrote {count} plots to {options.png}")
            if options.tensorboard:
                write_tensorboard(Path(options.tensorboard), self.runs, self.drawing)
                print(f"wrote {options.tensorboard}; look at it with: tensorboard --logdir {options.tensorboard}")
        except OSError as error:
            raise UserError(f"cannot write {error.filename}: {error.strerror}") from error


def _check(options: argparse.Namespace) -> None:
    """Refuse places that cannot be written to before anything is, and say which options have no effect.

    Raises:
        UserError: If an output is a folder where a file belongs, or the other way round.
    """
    for name in ("csv", "json", "html"):
        if (value := getattr(options, name)) and Path(value).is_dir():
            raise UserError(f"--{name} {value}: that is a folder, not a file")
    if options.png and Path(options.png).exists() and not Path(options.png).is_dir():
        raise UserError(f"--png {options.png}: that is a file, not a folder")
    if options.tensorboard:
        from kvc.report.tensorboard import check_folder

        check_folder(Path(options.tensorboard))
    if options.samples is not None and options.samples < 0:
        raise UserError(f"--samples {options.samples}: give 0 or more")
    needs: dict[str, Any] = {"samples": options.html, "title": options.html}
    needs["x"] = options.html or options.png or options.tensorboard
    for name, used in needs.items():
        if getattr(options, name) is not None and not used:
            wanted = "--html, --png or --tensorboard" if name == "x" else "--html"
            print(f"warning: --{name} has no effect without {wanted}")


def _ours(path: Path, options: argparse.Namespace) -> bool:
    """Whether a path is what a comparison wrote: `runs/*` also names that."""
    if path.is_file() and path.name in WRITTEN:
        return True
    if (path / "result.json").exists():
        return False
    outputs = [getattr(options, name) for name in ("csv", "json", "html", "png", "tensorboard")]
    return any(output and path.exists() and path.resolve() == Path(output).resolve() for output in outputs)
