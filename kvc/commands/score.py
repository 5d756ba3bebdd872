"""`python -m kvc score`: samples of `kvc ask` graded; pass@k, mean and majority of every arm, with intervals."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from kvc.commands import CommandParser
from kvc.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import Console

    from kvc.scoring.cells import Cell

EPILOG = """\
examples:
  python -m kvc score answers.json
  python -m kvc score memories/limo                  (every answer file below the folder)
  python -m kvc score runs/rkv_budgets/ask --png plots --output runs/rkv_budgets
  python -m kvc score answers.json --k 1 5 10
  python -m kvc score baseline.json --answer 016     (for records without an answer)

The answer of a response is in its last \\boxed{...}, else after #### or "answer is", else its last number. 016 is 16,
\\frac{1}{2} is 1/2 is 0.5, and expressions are compared by math-verify. mean is the share of right samples (pass@1),
pass@k the unbiased chance that one of k is right. Files that differ only in seeds are one cell: scores of a question
are means over its files, and 95 % intervals are over questions.
"""
CSV, JSON = "extracted_answers_passk.csv", "extracted_answers_passk.json"
HIDDEN = ("pass@1", "finished", "kv_bytes_peak")
"""Metrics that the printed table leaves out."""


def parser() -> argparse.ArgumentParser:
    """Arguments of the command."""
    result = CommandParser(
        prog="python -m kvc score",
        description="Grade the samples of `kvc ask`: pass@k, mean and majority of every arm.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = result.add_argument
    add("runs", metavar="RUN_OR_FILE", nargs="+", type=Path, help="answer file, or a folder with such files below it")
    add("--k", metavar="K", type=int, nargs="+", help="sizes of draws; default: powers of two, and all samples")
    add("--answer", metavar="TEXT", help="the right answer of records that have none")
    add("--metric", metavar="NAME", nargs="+", action="extend", help="metrics to show and draw; default: most")
    add("--output", metavar="DIR", type=Path, help="where to write; default: the files' common folder")
    add("--png", metavar="FOLDER", type=Path, help="write heat maps and curves over the settings of the cells")
    return result


def main(argv: list[str]) -> int:
    """Grade, print the tables and write the files.

    Args:
        argv: Arguments after `score`.

    Returns:
        Exit code.

    Raises:
        UserError: If a file is missing or malformed, or a k or metric does not fit; nothing is written then.
    """
    options = parser().parse_args(argv)
    if options.k and min(options.k) < 1:
        raise UserError(f"--k {min(options.k)}: give numbers from 1")
    from rich.console import Console

    from kvc.core.files import write_json, write_text
    from kvc.report.folder import common_folder
    from kvc.scoring.cells import make_cells
    from kvc.scoring.files import find_files, read_samples
    from kvc.scoring.tables import as_csv, as_json

    paths = find_files(options.runs)
    cells, ks = make_cells([read_samples(path, options.answer) for path in paths], options.k)
    metrics = _metrics(cells, options.metric)
    folder = options.output or common_folder(list(dict.fromkeys(path.parent for path in paths)))
    drawn = _draw(cells, options) if options.png else {}
    _print(cells, metrics, Console())
    try:
        write_text(folder / CSV, as_csv(cells))
        write_json(folder / JSON, as_json(cells, ks))
        print(f"wrote {folder / CSV} and {folder / JSON}")
        if drawn:
            from kvc.report.render import write_pngs

            print(f"wrote {len(write_pngs(options.png, drawn))} plots to {options.png}")
    except OSError as error:
        raise UserError(f"cannot write {error.filename or folder}: {error.strerror}") from error
    return 0


def _draw(cells: "list[Cell]", options: argparse.Namespace) -> "dict[str, Figure]":
    """Plots of the metrics asked for, else of the mean.

    Raises:
        UserError: If the cells differ in nothing that is drawn, or their place is a file.
    """
    from kvc.commands.score_plots import figures

    if options.png.exists() and not options.png.is_dir():
        raise UserError(f"--png {options.png}: that is a file, not a folder")
    drawn = {name: figure for metric in options.metric or ["mean"] for name, figure in figures(cells, metric).items()}
    if not drawn:
        raise UserError(f"--png {options.png}: plots need memories that differ in a setting; there is one cell")
    return drawn


def _metrics(cells: "list[Cell]", asked: list[str] | None) -> list[str]:
    """Metrics to show.

    Raises:
        UserError: If one of those asked for is not there.
    """
    scores = [graded.scores for cell in cells for every in cell.graded.values() for _, graded in every]
    known = list(dict.fromkeys(name for score in scores for name in score))
    for name in asked or []:
        if name not in known:
            raise UserError(f"--metric {name}: there are {', '.join(known)}")
    return asked or [name for name in known if name not in HIDDEN]


def _print(cells: "list[Cell]", metrics: list[str], console: "Console") -> None:
    """Every arm of every cell, then what the first arm is better than the others by."""
    from kvc.report.table import Row, print_rows

    rows, paired = [], []
    for cell in cells:
        first = cell.method
        for arm in (first, *cell.others):
            counts = sorted({len(graded.answers) for _, graded in cell.graded[arm]})
            facts = {
                "questions": str(len(cell.scores(arm))),
                "samples": "-".join(map(str, counts[:: len(counts) - 1 or 1])),
            }
            facts |= {"files": str(len(cell.files))} if len(cell.files) > 1 else {}
            values = {name: value.as_dict() for name, value in cell.values(arm).items()}
            rows.append(
                Row(f"{cell.label}: {arm}" if arm == first else cell.label, "" if arm == first else arm, values, facts)
            )
        for arm in cell.others:
            values = {name: value.as_dict() for name, value in cell.differences(arm).items()}
            paired.append(Row(f"{cell.label}: {first} - {arm}", "", values, {}))
    print_rows(console, "Scores (95 % interval over questions; best bold)", rows, metrics)
    if paired:
        print_rows(console, "Paired differences (* interval excludes 0)", paired, metrics, signed=True)
