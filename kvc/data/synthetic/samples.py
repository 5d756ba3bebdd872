"""Writes a few items of every task as JSONL: `python -m kvc.data.synthetic.samples FOLDER`.

One object per line: `task`, `level`, `context` (a list of texts, in the order of time), `query`, `lead` (how the
answer is announced), `answer`, and `choices` where the query shows them. `context`, `query`, `lead` and `answer`, one
after the other, are the text that a model reads.
"""

import argparse
import json
import sys
from pathlib import Path

from kvc.core.files import write_text
from kvc.core.seeds import DEFAULT_SEED
from kvc.data.synthetic.base import document_text
from kvc.data.synthetic.example import Example
from kvc.data.synthetic.tasks import TASKS, example


def record(task: str, level: str, item: Example) -> dict[str, object]:
    """An item as a JSON object."""
    first, *others = (document_text(list(chunk)) for chunk in item.chunks)
    turn = item.turns[0]
    return {
        "task": task,
        "level": level,
        "context": [item.head + first, *others],
        "query": turn.query,
        "lead": turn.lead,
        "answer": document_text(list(turn.answer)),
        **({"choices": list(item.choices)} if item.choices else {}),
    }


def sample_lines(task: str, seed: int = DEFAULT_SEED) -> str:
    """An item of each of the first two difficulties, a line each."""
    levels = TASKS[task].levels[:1] if task == "documents" else TASKS[task].levels[:2]
    items = [(level.name, example(task, "train", seed, 0, level.name)) for level in levels]
    return "".join(json.dumps(record(task, level, item)) + "\n" for level, item in items)


def main(argv: list[str]) -> int:
    """Write `<task>.jsonl` for every task."""
    parser = argparse.ArgumentParser(
        prog="python -m kvc.data.synthetic.samples",
        description="Write a few items of every synthetic task, one JSONL file each.",
        epilog="example: python -m kvc.data.synthetic.samples data/samples",
    )
    parser.add_argument("folder", type=Path, help="folder to write to; files of the same names are replaced")
    folder = parser.parse_args(argv).folder
    folder.mkdir(parents=True, exist_ok=True)
    for task in TASKS:
        write_text(folder / f"{task}.jsonl", sample_lines(task))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
