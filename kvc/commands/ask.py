"""`ask`: answer questions from a studied memory, and from the baselines beside it."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvc.commands import CommandParser
from kvc.commands.annotate_openai import positive
from kvc.commands.models import add_model_options, load_model
from kvc.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from kvc.cache.memory import KVMemory
    from kvc.methods.study.answers import AnswerFile
    from kvc.methods.study.arms import Arm
    from kvc.methods.study.asking import AskSettings
    from kvc.methods.study.conversation import Conversation
    from kvc.methods.study.questions import Asked

EPILOG = """\
arms: what the question is asked with, any of
  memory     the studied memory
  none       nothing
  full       all that was studied, read again, nothing evicted
  notes      what the model wrote, as text (or as much of the documents' text as the memory has rows)
  unrelated  the memory of other documents, --unrelated MEMORY

A single answer is printed as it comes. FILE gets every answer; the same command goes on where it was killed.
Sample i of a question draws what a single sample draws with --seed plus i.

examples:
  python -m kvc ask memories/first "What is the remainder when 7^100 is divided by 13?"
  python -m kvc ask memories/first --questions test.jsonl --repeat_time 16 --output_file answers.json
  python -m kvc ask memories/first --questions test.jsonl --arms memory none full notes unrelated \\
      --unrelated memories/other --output_file answers.json
  python -m kvc ask memories/first "Where does Tina live?" --temperature 0 --max_new_tokens 16
"""


def parser() -> argparse.ArgumentParser:
    """Arguments of the command."""
    result = CommandParser(
        prog="python -m kvc ask",
        description="Answer questions from a memory that kvc study made, and from baselines.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = result.add_argument
    add("memory", type=Path, metavar="MEMORY", help="folder of a studied memory")
    add("question", nargs="?", metavar="QUESTION", help="one question")
    add("--questions", type=Path, metavar="FILE", help="JSON or JSONL file: question (or problem), answer, id")
    add("--limit", type=positive, metavar="N", help="only the first N questions of the file")
    add("--answer", metavar="TEXT", help="the right answer to QUESTION, kept with the answers")
    add("--arms", nargs="+", metavar="ARM", help="memory none full notes unrelated (default: memory)")
    add("--unrelated", type=Path, metavar="MEMORY", help="memory of other documents; adds the arm unrelated")
    add("--doc_id", type=positive, metavar="N", help="the memory as it was after N documents (study --every_document)")
    add("--repeat_time", type=positive, default=1, metavar="N", help="samples of each answer (default: 1)")
    add("--batch_size", type=positive, default=1, metavar="N", help="questions decoded together (default: 1)")
    add("--max_new_tokens", type=positive, default=8192, metavar="N", help="longest answer (default: 8192)")
    add("--temperature", type=float, default=0.6, help="0 is greedy (default: 0.6)")
    add("--top_p", type=float, default=0.95, help="share of the probability that is drawn from (default: 0.95)")
    add("--seed", type=int, default=42, help="of the draws (default: 42)")
    add("--output_file", type=Path, metavar="FILE", help="JSON file of all answers")
    add("--overwrite", action="store_true", help="replace FILE if it holds other answers")
    add_model_options(result, None, "the model that studied (default: as the memory says)")
    return result


def main(argv: list[str]) -> int:
    """Ask.

    Args:
        argv: Arguments after `ask`.

    Returns:
        0.

    Raises:
        UserError: If memory, questions, settings or model do not do.
    """
    options = parser().parse_args(argv)
    if (options.question is None) == (options.questions is None):
        raise UserError("ask takes one question, or --questions FILE")
    names = _arm_names(options)

    from kvc.methods.study.answers import AnswerFile
    from kvc.methods.study.arms import arms_of
    from kvc.methods.study.asking import AskSettings
    from kvc.methods.study.conversation import Conversation
    from kvc.methods.study.folder import MemoryFolder, load_studied, study_of
    from kvc.methods.study.layouts import LAYOUTS

    settings = AskSettings(
        options.repeat_time, options.max_new_tokens, options.temperature, options.top_p, options.seed
    )
    questions = _questions(options)
    path = MemoryFolder(options.memory).stage(options.doc_id)
    study = study_of(path)
    _take_model(options, study["backbone"], path)
    model, tokenizer, _ = load_model(options)
    memory, study = load_studied(path, model)
    unrelated, other = None, None
    if options.unrelated is not None:
        other = MemoryFolder(options.unrelated).stage()
        unrelated, their = load_studied(other, model)
        if their["kind"] != study["kind"]:
            raise UserError(f"--unrelated {options.unrelated}: documents of another kind, {their['kind']}")
    head = _head(model, memory, path, other, settings, names, questions)
    answers = AnswerFile(options.output_file, head, options.overwrite)
    if answers.finished:
        print(f"{options.output_file} is finished: {len(answers.results)} results (--overwrite asks again)")
        return 0
    conversation = Conversation(tokenizer, LAYOUTS[study["kind"]])
    arms = arms_of(names, model, conversation, memory, study, unrelated)
    _ask_all(model, conversation, arms, questions, settings, options.batch_size, answers)
    answers.finish([question.id for question in questions])
    if options.output_file is not None:
        print(f"{len(answers.results)} results -> {options.output_file}")
    return 0


def _arm_names(options: argparse.Namespace) -> list[Any]:
    """The arms that are meant, in their order.

    Raises:
        UserError: If there is no such arm, or one lacks its memory.
    """
    known = ("memory", "none", "full", "notes", "unrelated")
    names = set(options.arms or ["memory"]) | ({"unrelated"} if options.unrelated is not None else set())
    for name in sorted(names - set(known)):
        raise UserError(f"--arms: there is none named '{name}'; known are {', '.join(known)}")
    if "unrelated" in names and options.unrelated is None:
        raise UserError("--arms unrelated needs --unrelated MEMORY, the memory of other documents")
    return [name for name in known if name in names]


def _questions(options: argparse.Namespace) -> "list[Asked]":
    from kvc.methods.study.questions import Asked, gold_of, read_questions

    if options.questions is not None:
        if options.answer is not None:
            raise UserError("--answer belongs to one question; a file has its answers in it")
        return read_questions(options.questions, options.limit)
    if not options.question.strip():
        raise UserError("the question is empty")
    return [Asked(0, options.question.strip(), None if options.answer is None else gold_of(options.answer))]


def _take_model(options: argparse.Namespace, backbone: dict[str, Any], path: Path) -> None:
    """The model that studied, unless another was named.

    Raises:
        UserError: If it was a folder, of which the memory does not know where it lies.
    """
    if options.model is None:
        options.model = backbone.get("pretrained")
        if options.model is None:
            raise UserError(f"{path}: a folder was its model, name it with --model")
    options.dtype = options.dtype or backbone.get("dtype")


def _head(
    model: "PreTrainedModel",
    memory: "KVMemory",
    path: Path,
    other: Path | None,
    settings: "AskSettings",
    names: list[str],
    questions: "list[Asked]",
) -> dict[str, Any]:
    """Everything that the answers depend on."""
    from dataclasses import asdict

    from kvc.cache.store import read_metadata
    from kvc.core.files import digest
    from kvc.methods.study.folder import study_of

    metadata, study = read_metadata(path), study_of(path)
    return {
        "model": metadata["model"],
        "memory": {
            "path": path.parent.name,
            "content": metadata["content"],
            "rows": metadata["tokens"][0],
            "bytes": memory.bytes,
            "next_position": metadata["next_position"][0],
            "study": study["identity"],
            "documents": len(study["documents"]) // study["identity"]["num_epochs"],
            "tokens_read": len(study["token_ids"]),
        },
        "unrelated": None if other is None else read_metadata(other)["content"],
        "settings": {**asdict(settings), "template": study["kind"]},
        "arms": names,
        "questions": digest([list(question) for question in questions]),
        "versions": metadata["versions"],
    }


def _ask_all(
    model: "PreTrainedModel",
    conversation: "Conversation",
    arms: "list[Arm]",
    questions: "list[Asked]",
    settings: "AskSettings",
    batch_size: int,
    answers: "AnswerFile",
) -> None:
    """Ask with every arm; a single question is shown, many get a bar."""
    from rich.console import Console
    from rich.progress import Progress
    from transformers import TextStreamer

    from kvc.methods.study.asking import ask

    single = len(questions) == 1
    streams = single and settings.repeat_time == 1
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=single or not console.is_terminal) as bar:
        task = bar.add_task("answers", total=len(questions) * len(arms))
        for start in range(0, len(questions), batch_size):
            for arm in arms:
                part = [q for q in questions[start : start + batch_size] if not answers.has(arm.name, q.id)]
                if part:
                    if single and len(arms) > 1:
                        print(f"--- {arm.name}")
                    streamer = TextStreamer(conversation.tokenizer, skip_prompt=True, skip_special_tokens=True)
                    found = ask(
                        model, conversation, arm, part, settings, streamer if streams else None, single and not streams
                    )
                    answers.add(found)
                    if single and not streams:
                        _show(found[0])
                bar.advance(task, min(batch_size, len(questions) - start))


def _show(result: dict[str, Any]) -> None:
    """Print the samples of one question."""
    for number, generation in enumerate(result["all_generations"], start=1):
        print(f"[{number}] {generation['response']}")
