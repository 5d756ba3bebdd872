"""From a source of problems to a file of valid traces, in any number of sessions."""

import asyncio
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kvc.core.files import write_json
from kvc.data.annotate.base import read_gold
from kvc.data.annotate.chat.annotator import OpenAIAnnotator
from kvc.data.annotate.chat.collect import Collection
from kvc.data.annotate.chat.journal import Journal
from kvc.data.annotate.chat.outcome import NAME
from kvc.data.annotate.chat.pool import Pool, make_pool
from kvc.data.annotate.chat.progress import CollectionProgress
from kvc.data.annotate.chat.prompt import PROMPT_ID
from kvc.data.annotate.chat.tally import Prices, Tally
from kvc.data.traces import HUB, Trace, write_jsonl
from kvc.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class Task:
    """What to collect.

    Attributes:
        source: File or `hub:owner/name`.
        output: JSONL file of valid traces; the journal and the summary lie beside it.
        number: Valid traces wanted; all that can be had if None.
        seed: Seed of the order in which questions are drawn.
        split: Split of a Hub dataset.
        concurrency: Largest number of questions in flight.
        again: How often a question may be asked again after an invalid reply, once all others were asked.
        prices: For the estimate of the cost.
        overwrite: Discard what an earlier run with this output has collected.
    """

    source: str
    output: Path
    number: int | None = None
    seed: int = 42
    split: str = "train"
    concurrency: int = 8
    again: int = 1
    prices: Prices | None = None
    overwrite: bool = False

    @property
    def journal(self) -> Path:
        """`FILE.journal.jsonl`."""
        return self.output.with_name(f"{self.output.name}.journal.jsonl")

    @property
    def summary(self) -> Path:
        """`FILE.summary.json`."""
        return self.output.with_name(f"{self.output.name}.summary.json")


def run(task: Task, annotator: OpenAIAnnotator, console: "Console") -> list[Trace]:
    """Collect valid traces and write them.

    Args:
        task: What to collect.
        annotator: Whom to ask.
        console: Where to report.

    Returns:
        The traces in the output file.

    Raises:
        UserError: The input or an earlier journal is unusable, the server does not answer, or no reply was valid. What
            was answered stays in the journal, and the output file is as it was.
    """
    pool = make_pool(read_gold(task.source, task.split), task.seed)
    if not pool.items:
        raise UserError(f"--input {task.source}: holds no question with a number as its answer")
    sampling = annotator.sampling
    settings = {
        "annotator": NAME,
        "input": task.source if task.source.startswith(HUB) else Path(task.source).name,
        "content of the input": pool.identity,
        "seed": task.seed,
        "model": sampling.model,
        "temperature": sampling.temperature,
        "max_tokens": sampling.max_tokens,
        "prompt": PROMPT_ID,
    }
    _check_writable(task)
    with Journal(task.journal, settings, task.overwrite) as journal:
        collection = Collection(pool, journal, sampling.model, task.number, task.again)
        tally = Tally(task.prices)
        for outcome in journal.outcomes:
            tally.add(outcome)
        if not task.overwrite:
            _check_output(task.output, collection)
        if journal.outcomes:
            console.print(f"{task.journal}: going on, {tally.valid} valid so far", soft_wrap=True, highlight=False)
        try:
            structured = journal.outcomes[-1].structured if journal.outcomes else True
            with CollectionProgress(console, tally, len(collection.valid), collection.number) as progress:
                asyncio.run(_collect(collection, annotator, structured, task.concurrency, progress))
        except UserError as error:
            kept = f"; {tally.valid} valid traces are kept, the same command goes on" if journal.outcomes else ""
            raise UserError(f"{error}{kept}") from error
        traces = collection.traces()
        if traces:
            _write(task, annotator, pool, tally, settings, traces)
    _report(task, pool, tally, len(traces), collection.number, console)
    return traces


async def _collect(
    collection: Collection, annotator: OpenAIAnnotator, structured: bool, concurrency: int, progress: CollectionProgress
) -> None:
    async with annotator.client(structured) as client:
        await collection.run(client, concurrency, progress)


def _check_writable(task: Task) -> None:
    """Find out before the first question is paid for."""
    import os

    folder = task.output.absolute().parent
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UserError(f"--output {task.output}: {folder} is no folder that can be written to")


def _check_output(output: Path, collection: Collection) -> None:
    """An existing output is only replaced if everything in it is in the journal too."""
    if not output.exists():
        return
    known = {json.dumps(trace.record(), ensure_ascii=False) for trace in collection.valid.values()}
    try:
        lines = [line for line in output.read_text(encoding="utf-8").split("\n") if line]
    except (OSError, UnicodeDecodeError):
        lines = [""]
    if not known.issuperset(lines):
        raise UserError(f"--output {output}: exists and holds what its journal does not; add --overwrite to replace it")
    if len(lines) > collection.number:
        raise UserError(f"--output {output}: already holds {len(lines)} traces; choose another --output for fewer")


def _write(
    task: Task, annotator: OpenAIAnnotator, pool: Pool, tally: Tally, settings: dict[str, object], traces: list[Trace]
) -> None:
    summary = {
        "written": len(traces),
        "asked_for": task.number,
        "pool": len(pool.items),
        **tally.summary(),
        "base_url": annotator.endpoint.base_url,
        "settings": settings,
    }
    try:
        write_jsonl(task.output, traces)
        write_json(task.summary, summary)
    except OSError as error:
        raise UserError(f"--output {task.output}: cannot be written: {error.strerror}") from error


def _report(task: Task, pool: Pool, tally: Tally, written: int, number: int, console: "Console") -> None:
    def say(text: str) -> None:
        console.print(text, soft_wrap=True, markup=False, highlight=False)

    for count, why in ((pool.repeated, "repeat another"), (pool.unusable, "have a gold answer that is no number")):
        if count:
            say(f"left out {count} questions of the input that {why}")
    say(tally.text())
    wanted = task.number or number
    if written < wanted:
        why = f"; not valid: {tally.reasons_text()}" if tally.reasons else ""
        say(f"{written} of {wanted} valid traces: all {len(pool.items)} questions were asked{why}")
