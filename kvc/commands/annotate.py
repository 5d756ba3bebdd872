"""`annotate`: put `<COMP>` markers into reasoning traces, or analyse traces that have them."""

import argparse
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from kvc.commands import CommandParser
from kvc.commands.annotate_openai import OPENAI_OPTIONS, add_options, collect, positive
from kvc.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from kvc.data.annotate.statistics import MarkStatistics
    from kvc.data.traces import Trace

SYNTHETIC = "synthetic:reasoning"
DEFAULT_SYNTHETIC = 1000
EPILOG = """\
input: a local file, hub:owner/name or hub:owner/name:config, whose rows are traces (question,
reasoning_with_compression, answer, original_reasoning) or in the layout of GSM8K (question, answer that ends in
'#### N'); or synthetic:reasoning.

annotators:
  rules      marks the end of each finished calculation, conclusion or stated fact; works without a network,
             on every input (of synthetic:reasoning it reads the solutions without their markers)
  synthetic  keeps the generator's own markers, which are the ground truth; only for synthetic:reasoning
  openai     lets a model solve each question and mark its solution, and keeps what has the right answer and sound
             markers; any server with OpenAI's Chat Completions protocol; the key is read from $OPENAI_API_KEY alone.
             Questions are drawn from the whole input, in an order that depends on --seed, until N traces are valid.
             Every reply is kept in FILE.journal.jsonl: the same command goes on where it was stopped, and a larger
             --num_samples adds to it. FILE appears at the end, with FILE.summary.json (counts, tokens, cost).

examples:
  python -m kvc annotate --annotator rules --input gsm8k.jsonl --output traces.jsonl
  python -m kvc annotate --annotator rules --input hub:openai/gsm8k:main --num_samples 1000 --output traces.jsonl
  python -m kvc annotate --annotator synthetic --input synthetic:reasoning --num_samples 500 --output traces.jsonl
  python -m kvc annotate --annotator openai --input hub:openai/gsm8k:main --num_samples 1000 --output traces.jsonl
  python -m kvc annotate --annotator openai --input gsm8k.jsonl --num_samples 100 --output traces.jsonl \\
      --base_url http://localhost:8000/v1 --model Qwen/Qwen3-8B --concurrency 32
  python -m kvc annotate --analyze_only traces.jsonl
"""


def parser() -> argparse.ArgumentParser:
    """The argument parser of the command."""
    result = CommandParser(
        prog="python -m kvc annotate",
        description="Put <COMP> markers into reasoning traces, or analyse traces that have them.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = result.add_argument
    add(
        "--annotator",
        choices=("rules", "synthetic", "openai"),
        default="rules",
        help="who places the markers (default: rules)",
    )
    add("--input", metavar="SOURCE", help="file, hub:owner/name or synthetic:reasoning")
    add("--output", type=Path, metavar="FILE", help="JSONL file to write")
    add("--num_samples", type=positive, metavar="N", help="valid traces to write (default: all; 1000 if synthetic)")
    add("--seed", type=int, default=42, help="seed of synthetic:reasoning, and of openai's draws (default: 42)")
    add("--split", choices=("train", "val", "test"), default="train", help="split of synthetic or Hub data")
    add("--overwrite", action="store_true", help="replace an existing output file, and its journal")
    add(
        "--analyze_only",
        type=Path,
        metavar="FILE",
        help="print histogram and categories of a trace file, write nothing",
    )
    add_options(result)
    return result


def _traces(annotator: str, source: str, number: int | None, seed: int, split: str) -> "Iterator[Trace]":
    """Annotated traces in the order of the input, valid or not."""
    from dataclasses import replace

    from kvc.data.annotate.base import read_gold
    from kvc.data.annotate.rules import RulesAnnotator
    from kvc.data.traces import synthetic_traces

    rules = RulesAnnotator()
    if source == SYNTHETIC:
        for trace in synthetic_traces(number or DEFAULT_SYNTHETIC, seed, split):
            if annotator == "synthetic":
                yield trace
            else:
                marked = rules.annotate(trace.question, trace.answer, trace.original_reasoning)
                yield replace(marked, extra={"source": SYNTHETIC, **marked.extra})
        return
    for gold in read_gold(source, "validation" if split == "val" else split):
        marked = rules.annotate(gold.question, gold.answer, gold.reasoning)
        yield replace(marked, extra={"source": gold.source, **marked.extra})


def _select(traces: "Iterator[Trace]", number: int | None, console: "Console") -> "tuple[list[Trace], Counter[str]]":
    """The first `number` valid traces (all if None), each marked `valid`, and the reasons against the others."""
    from dataclasses import replace

    from rich.progress import Progress, SpinnerColumn, TextColumn

    from kvc.data.traces import validate

    kept: list[Trace] = []
    reasons: Counter[str] = Counter()
    columns = (SpinnerColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("annotating", total=number)
        for trace in traces:
            found = validate(trace)
            reasons.update(found)
            if not found:
                kept.append(replace(trace, extra={**trace.extra, "valid": True}))
            progress.update(
                task, advance=not found, description=f"{len(kept)} valid, {reasons.total()} reasons against others"
            )
            if number is not None and len(kept) == number:
                break
    return kept, reasons


def main(argv: list[str]) -> int:
    """Run the command.

    Args:
        argv: Arguments after `annotate`.

    Returns:
        0.

    Raises:
        UserError: The input is missing or malformed, nothing in it is valid, the output exists, or a server does not
            answer.
    """
    arguments = parser().parse_args(argv)
    from rich.console import Console

    from kvc.data.annotate.statistics import mark_statistics, print_statistics
    from kvc.data.traces import read_traces, write_jsonl

    console = Console()
    if arguments.analyze_only is not None:
        if arguments.output is not None or arguments.input is not None:
            raise UserError("--analyze_only takes neither --input nor --output")
        print_statistics(mark_statistics(read_traces(arguments.analyze_only)), console)
        return 0
    source, output = arguments.input, arguments.output
    if source is None or output is None:
        raise UserError("--input and --output are both needed (or --analyze_only FILE)")
    if arguments.annotator == "synthetic" and source != SYNTHETIC:
        raise UserError(f"--annotator synthetic needs --input {SYNTHETIC}, got {source}")
    if source.startswith("synthetic:") and source != SYNTHETIC:
        raise UserError(f"--input {source}: the only synthetic source is {SYNTHETIC}")
    if output.is_dir():
        raise UserError(f"--output {output}: is a folder")
    if arguments.annotator == "openai":
        kept = collect(arguments, console)
        if not kept:
            raise UserError(f"--input {source}: no valid trace, nothing written")
        _say_what_was_written(mark_statistics(kept), output, console)
        return 0
    for name in OPENAI_OPTIONS:
        if getattr(arguments, name) is not None:
            warnings.warn(f"--{name} has no effect with --annotator {arguments.annotator}", stacklevel=2)
    if output.exists() and not arguments.overwrite:
        raise UserError(f"--output {output}: exists, add --overwrite to replace it")
    traces = _traces(arguments.annotator, source, arguments.num_samples, arguments.seed, arguments.split)
    kept, reasons = _select(traces, arguments.num_samples, console)
    for reason, count in reasons.most_common():
        console.print(f"dropped for {reason}: {count}")
    if not kept:
        raise UserError(f"--input {source}: no valid trace, nothing written")
    try:
        write_jsonl(output, kept)
    except OSError as error:
        raise UserError(f"--output {output}: cannot be written: {error.strerror}") from error
    _say_what_was_written(mark_statistics(kept), output, console)
    return 0


def _say_what_was_written(statistics: "MarkStatistics", output: Path, console: "Console") -> None:
    console.print(f"{statistics.traces} traces, {statistics.mean:.2f} COMP each -> {output}", soft_wrap=True)
