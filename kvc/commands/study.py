"""`study`: read documents once, and keep the compressed memory of them."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from kvc.commands import CommandParser
from kvc.commands.annotate_openai import positive
from kvc.commands.models import add_model_options, load_model
from kvc.errors import UserError

if TYPE_CHECKING:
    from kvc.methods.study.settings import StudySettings

EPILOG = """\
documents: a JSON list or JSONL file of solved problems (question, solution, answer; or problem, reasoning, solution)
or of plain texts (text). After each document the memory is compressed to --budget rows per layer and KV head.

modes:
  none       only the documents are read
  takeaways  the model writes what it takes away from each document
  notepad    the model rewrites one note after each document
  append     the model adds points to one note after each document

output: DIR/memory.safetensors, and DIR/metadata.json for people. The same command goes on where it was killed; a
finished memory of the same configuration is left as it is, one of another is never overwritten without --recompute.

examples:
  python -m kvc study examples.jsonl --model deepseek-ai/DeepSeek-R1-Distill-Qwen-7B --output memories/first
  python -m kvc study facts.jsonl --mode none --budget 96 --window 16 --prefix 16
  python -m kvc study examples.jsonl --budget 640 --rotation place:2048 --summary_complexity simple --data_limit 3
  python -m kvc study facts.jsonl --mode none --budget none --output memories/full      (nothing is evicted)
"""


def _budget(text: str) -> int | None:
    return None if text == "none" else positive(text)


def parser() -> argparse.ArgumentParser:
    """Arguments of the command."""
    result = CommandParser(
        prog="python -m kvc study",
        description="Read documents once, and keep the compressed memory of them for many questions (kvc ask).",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = result.add_argument
    add("documents", type=Path, metavar="DOCS", help="JSON or JSONL file")
    add("--output", type=Path, metavar="DIR", help="folder of the memory (default: memories/NAME, from the settings)")
    add("--budget", type=_budget, default=1312, metavar="N", help="rows kept, or none (default: 1312 = 1024+128+160)")
    add("--window", type=positive, default=128, metavar="N", help="newest rows that always stay (default: 128)")
    add("--prefix", type=int, default=160, metavar="N", help="first tokens that are never evicted (default: 160)")
    add("--policy", default="rkv", metavar="NAME", help="which rows stay (default: rkv)")
    add("--mode", choices=("none", "takeaways", "notepad", "append"), default="takeaways", help="default: takeaways")
    add("--summary_complexity", choices=("simple", "complex"), default="complex", help="default: complex")
    add("--rotation", default="keep", metavar="HOW", help="keep, compact or place:T (default: keep)")
    add("--num_epochs", type=positive, default=1, metavar="N", help="times that the documents are read (default: 1)")
    add("--data_limit", type=positive, metavar="N", help="only the first N documents")
    add("--reverse", action="store_true", help="last document first, for files that begin with the most similar")
    add("--max_document_tokens", type=positive, default=12_000, metavar="N", help="leave out longer (default: 12000)")
    add("--max_new_tokens", type=positive, default=2048, metavar="N", help="longest summary (default: 2048)")
    add("--temperature", type=float, default=0.1, help="of the summaries; 0 is greedy (default: 0.1)")
    add("--top_p", type=float, default=0.95, help="of the summaries (default: 0.95)")
    add("--chunk", type=positive, default=2048, metavar="N", help="tokens read by one forward (default: 2048)")
    add("--every_document", action="store_true", help="also keep the memory after each document (ask --doc_id)")
    add("--seed", type=int, default=42, help="of the summaries (default: 42)")
    add("--recompute", action="store_true", help="replace what the folder holds")
    add_model_options(result, "tiny", "tiny, a folder or a Hub id (default: tiny)")
    return result


def main(argv: list[str]) -> int:
    """Study.

    Args:
        argv: Arguments after `study`.

    Returns:
        0.

    Raises:
        UserError: If documents, settings, model or folder do not do.
    """
    options = parser().parse_args(argv)
    settings = _settings(options)
    from rich.console import Console

    from kvc.methods.study.documents import read_documents
    from kvc.methods.study.folder import MemoryFolder
    from kvc.methods.study.plan import plan
    from kvc.methods.study.settings import policy_of
    from kvc.methods.study.study import Study
    from kvc.runs import lock_folder

    policy = policy_of(options.policy, settings.window)
    settings.eviction(policy)
    documents = read_documents(options.documents, options.data_limit, options.reverse)
    model, tokenizer, backbone = load_model(options)
    planned = plan(model, tokenizer, documents, settings, policy)
    folder = MemoryFolder(options.output or Path("memories") / planned.name)
    if folder.path.exists() and not folder.path.is_dir():
        raise UserError(f"--output {folder.path}: is not a folder")
    console = Console()
    with lock_folder(folder.path):
        study = Study(model, planned, backbone, progress=True)
        metadata = study.run(folder, options.recompute, lambda line: console.print(line, highlight=False))
    rows, end = metadata["tokens"][0], metadata["next_position"][0]
    read = len(metadata["user"]["study"]["token_ids"])
    console.print(f"{read} tokens -> {rows:g} rows, next position {end} -> {folder.memory}", soft_wrap=True)
    return 0


def _settings(options: argparse.Namespace) -> "StudySettings":
    from dataclasses import fields

    from kvc.methods.study.settings import StudySettings

    return StudySettings(**{field.name: getattr(options, field.name) for field in fields(StudySettings)})
