"""Questions over several paragraphs, in the format of HotpotQA (Yang et al. 2018)."""

from typing import Any, Literal

from kvc.core import seeds
from kvc.core.files import digest
from kvc.data.squad.example import SquadExample
from kvc.data.squad.module import Squad
from kvc.data.squad.template import Preset, SquadTemplate
from kvc.data.traces import HUB, hub_records, read_records
from kvc.errors import UserError

Paragraphs = Literal["all", "supporting"]


class HotpotQa(Squad):
    """HotpotQA: the context is all paragraphs of a question, each after its title.

    Answers need not stand in the context (yes, no): `span` is then -1, and training windows are drawn anywhere. For
    batches see `Squad`.

    Args:
        path: JSON as published (a list of objects with `_id`, `question`, `answer`, `context`: lists of a title and its
            sentences, and `supporting_facts`), or `hub:owner/name:config` (`hub:hotpotqa/hotpot_qa:distractor`).
        eval_path: Such a file with the test questions; the test share of `split` then trains.
        paragraphs: `all`, or the `supporting` ones alone.
        counts: See `Squad`.
        split: See `Squad`.
        split_seed: See `Squad`.
        template: See `Squad`.
        context_length: See `Squad`.
        long_eval: See `Squad`.
        max_answer: See `Squad`.
        batch_size: Questions of a training batch on each rank.
        eval_batch_size: Questions of an evaluation batch.
        num_workers: Loader processes.
        seed: Seed of order and windows.
    """

    def __init__(
        self,
        path: str,
        eval_path: str | None = None,
        paragraphs: Paragraphs = "all",
        counts: tuple[int, int, int] | None = None,
        split: tuple[float, float, float] = (0.8, 0.1, 0.1),
        split_seed: int = seeds.DEFAULT_SEED,
        template: Preset | SquadTemplate = "plain",
        context_length: int = 2048,
        long_eval: Literal["chunks", "truncate"] = "chunks",
        max_answer: int = 32,
        batch_size: int = 8,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int = seeds.DEFAULT_SEED,
    ) -> None:
        super().__init__(
            path,
            eval_path,
            counts,
            split,
            split_seed,
            template=template,
            context_length=context_length,
            long_eval=long_eval,
            max_answer=max_answer,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            seed=seed,
        )
        self.paragraphs: Paragraphs = paragraphs

    def read(self, source: str, split: str = "train") -> list[SquadExample]:
        """Questions of a source."""
        return load_hotpot(source, self.paragraphs, split)

    def data_hash(self) -> str:
        """Name of the questions and their presentation."""
        return digest(["hotpot", super().data_hash()])


def load_hotpot(source: str, paragraphs: Paragraphs = "all", split: str = "train") -> list[SquadExample]:
    """Read questions.

    Args:
        source: A JSON file, or `hub:owner/name:config`.
        paragraphs: Which paragraphs are the context.
        split: Split of a Hub dataset; a file has none.

    Raises:
        UserError: The source is missing, empty or malformed; names the file and the place in it.
    """
    from pathlib import Path

    hub = source.startswith(HUB)
    rows = hub_records(source.removeprefix(HUB), split) if hub else read_records(Path(source))
    examples, seen = [], set()
    for where, row in rows:
        example = _example(where, row, paragraphs)
        if example.key in seen:
            raise UserError(f"{where}: two questions have the id {example.key!r}")
        seen.add(example.key)
        examples.append(example)
    return examples


def _example(where: str, row: dict[str, Any], paragraphs: Paragraphs) -> SquadExample:
    key = row.get("_id", row.get("id"))
    question, answer = row.get("question"), row.get("answer")
    for name, value in (("_id", key), ("question", question), ("answer", answer)):
        if not isinstance(value, str) or not value.strip():
            raise UserError(f"{where}: key {name!r} is missing or no text")
    texts = _paragraphs(where, row.get("context"))
    if paragraphs == "supporting":
        titles = _supporting(where, row.get("supporting_facts"))
        texts = {title: text for title, text in texts.items() if title in titles}
        if not texts:
            raise UserError(f"{where}: no paragraph has a title of supporting_facts")
    context = "\n".join(f"{title}: {text}" for title, text in texts.items())
    # Where it stands is for training windows only; an answer such as "yes" stands nowhere.
    start = context.find(str(answer))
    return SquadExample(str(key), context, str(question), (str(answer),), (start,))


def _paragraphs(where: str, given: Any) -> dict[str, str]:
    """Titles and texts; the Hub has lists of titles and of sentences, the published file a list of pairs."""
    if isinstance(given, dict):
        given = list(zip(given.get("title", ()), given.get("sentences", ())))
    if not isinstance(given, list) or not given:
        raise UserError(f"{where}: key 'context' is missing or no list of paragraphs")
    found = {}
    for number, entry in enumerate(given):
        fine = isinstance(entry, list | tuple) and len(entry) == 2 and isinstance(entry[0], str)
        if not fine or not isinstance(entry[1], list) or not all(isinstance(text, str) for text in entry[1]):
            raise UserError(f"{where}: context[{number}]: expected a title and a list of sentences")
        found[entry[0]] = " ".join(text.strip() for text in entry[1])
    return found


def _supporting(where: str, given: Any) -> set[str]:
    if isinstance(given, dict):
        return set(given.get("title", ()))
    if not isinstance(given, list) or not all(isinstance(fact, list | tuple) and fact for fact in given):
        raise UserError(f"{where}: key 'supporting_facts' is missing or no list of titles and numbers")
    return {str(fact[0]) for fact in given}
