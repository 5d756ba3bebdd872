"""Mathematical problems with one final answer: GSM8K, MATH-500, AIME, or any file of their form."""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from kvc.core import seeds
from kvc.core.datamodule import KvcDataModule, Rows, Split
from kvc.core.files import digest
from kvc.data.answers import extract_answer, final_answer, last_boxed, same_answer
from kvc.data.prompts import Template, render_prompt
from kvc.data.questions import Judged
from kvc.data.traces import HUB, hub_records, read_records
from kvc.errors import UserError

QUESTION_KEYS = ("question", "problem")
ANSWER_KEYS = ("answer", "solution")


class MathProblem(NamedTuple):
    """One problem.

    Attributes:
        id: Its number in the source, from 0.
        question: The problem alone.
        prompt: As it is shown to the model.
        gold: The final answer.
        group: Name of the source.
        bare_prompt: None: all of a problem is needed.
    """

    id: int
    question: str
    prompt: str
    gold: str
    group: str
    bare_prompt: str | None = None

    def judge(self, completion: str) -> Judged:
        """Compare the final answer of a completion by value, or as text where it is no number."""
        answer = extract_answer(completion)
        return Judged(answer, same_answer(answer, self.gold))


class MathProblems(KvcDataModule):
    """Problems to solve, for evaluations only; every split but `test` is empty.

    A record has the problem under `question` or `problem`, and the final answer under `answer` (after `####` as in
    GSM8K, or alone), or at the end of `solution`.

    Batch: `questions`, a list of `MathProblem`.

    Args:
        path: JSON list or JSONL file, or `hub:owner/name` (`hub:openai/gsm8k:main`).
        split: Split of a Hub dataset.
        limit: Only the first so many; 0 takes all.
        template: How the question is presented; `chat` uses the tokenizer's chat template.
        eval_batch_size: Rows that are decoded together.
        seed: Of the run.
    """

    gives: ClassVar[tuple[str, ...]] = ("questions",)

    def __init__(
        self,
        path: str,
        split: str = "test",
        limit: int = 0,
        template: Template = "plain",
        eval_batch_size: int = 8,
        seed: int = seeds.DEFAULT_SEED,
    ) -> None:
        super().__init__(None, eval_batch_size, shuffle=False, seed=seed)
        self.path, self.split, self.limit, self.template = path, split, limit, template
        self.tokenizer: Any = None

    def setup(self, stage: str) -> None:
        """Take the tokenizer of the model that is measured."""
        self.tokenizer = self.trainer.lightning_module.tokenizer  # type: ignore[union-attr]

    @functools.cached_property
    def records(self) -> list[tuple[str, str]]:
        """Questions and final answers.

        Raises:
            UserError: The source is missing or malformed; the message names file, line and key.
        """
        found = [_record(where, row) for where, row in self._rows()]
        return found[: self.limit] if self.limit else found

    def _rows(self) -> Iterator[tuple[str, dict[str, Any]]]:
        if self.path.startswith(HUB):
            return hub_records(self.path.removeprefix(HUB), self.split)
        return read_records(Path(self.path))

    def has_split(self, split: Split) -> bool:
        """Only `test` has rows."""
        return split == "test"

    def dataset(self, split: Split) -> Any:
        """The problems, each rendered."""
        group = Path(self.path.removeprefix(HUB)).stem
        problems = [
            MathProblem(number, question, render_prompt(question, self.template, self.tokenizer), gold, group)
            for number, (question, gold) in enumerate(self.records if split == "test" else [])
        ]
        return Rows(problems)

    def collate(self, split: Split) -> Callable[[list[Any]], Any] | None:
        """A list, as it is."""
        return lambda rows: {"questions": rows}

    def data_hash(self) -> str:
        """Name of the contents."""
        return digest([self.records, self.template])

    def describe(self) -> dict[str, Any]:
        """Where the problems come from."""
        return {"source": self.path, "problems": len(self.records)}


def _record(where: str, row: dict[str, Any]) -> tuple[str, str]:
    """Question and final answer of one record.

    Raises:
        UserError: A key is missing, or no answer can be found.
    """
    question = next((str(row[key]) for key in QUESTION_KEYS if row.get(key)), None)
    if question is None:
        raise UserError(f"{where}: has none of the keys {', '.join(QUESTION_KEYS)}")
    text = next((str(row[key]) for key in ANSWER_KEYS if row.get(key) not in (None, "")), None)
    if text is None:
        raise UserError(f"{where}: has none of the keys {', '.join(ANSWER_KEYS)}")
    short = None if "\n" in text.strip() else text.strip()
    gold = final_answer(text) or last_boxed(text) or short
    if not gold:
        raise UserError(f"{where}: no final answer after #### or in \\boxed{{}}")
    return question, gold
