"""Questions with a context from other sources than SQuAD: the synthetic tasks, and word problems after solved ones."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch

from kvc.core import seeds
from kvc.core.datamodule import KvcDataModule, Split, check_split
from kvc.core.files import digest
from kvc.data.answers import extract_answer, final_answer, same_answer
from kvc.data.parts import KEYS, PARTS, collate_parts
from kvc.data.squad.example import SquadExample
from kvc.data.squad.grading import Score, answer_text
from kvc.data.synthetic.base import document_text
from kvc.data.synthetic.example import Example
from kvc.data.synthetic.tasks import TASKS, example
from kvc.data.traces import HUB, hub_records, read_records
from kvc.errors import UserError

SPLITS: tuple[Split, Split, Split] = ("train", "val", "test")


class Problem(NamedTuple):
    """A context, a question about it and how an answer is judged.

    Attributes:
        head: Before the context.
        context: What may be compressed.
        tail: Question and cue.
        answer: What training predicts, with the blank before it.
        gold: The right answer.
        group: What it is reported with.
        right: Whether a completion is right.
        shown: The part of a completion that is the answer.
    """

    head: str
    context: str
    tail: str
    answer: str
    gold: str
    group: str
    right: Callable[[str], bool]
    shown: Callable[[str], str]


class ProblemQuestion(NamedTuple):
    """A problem as a decoding evaluation sees it.

    Attributes:
        id: Its number in the split.
        problem: The problem.
    """

    id: int
    problem: Problem

    @property
    def group(self) -> str:
        """What it is reported with."""
        return self.problem.group

    @property
    def prompt(self) -> str:
        """Everything before the answer, without BOS."""
        return self.problem.head + self.problem.context + self.problem.tail

    @property
    def bare_prompt(self) -> str:
        """The prompt without the context."""
        return self.problem.tail.lstrip()

    @property
    def gold(self) -> str:
        """The right answer."""
        return self.problem.gold

    @property
    def example(self) -> SquadExample:
        """Question, context and gold answer."""
        return SquadExample(str(self.id), self.problem.context, self.problem.tail.strip(), (self.gold,), (-1,))

    def score(self, completion: str) -> Score:
        """Right or wrong: EM and F1 are the same."""
        right = self.problem.right(completion)
        return Score(self.problem.shown(completion), right, float(right))


class _Problems(KvcDataModule):
    """Problems as batches; a subclass writes `problems(split)` and `data_hash()`."""

    gives: ClassVar[tuple[str, ...]] = KEYS

    def setup(self, stage: str) -> None:
        """Take the tokenizer of the method's base model."""
        self.tokenizer: Any = self.trainer.lightning_module.tokenizer  # type: ignore[union-attr]

    def problems(self, split: Split) -> list[Problem]:
        """Problems of a split."""
        raise NotImplementedError(f"{type(self).__name__} has no problems")

    def has_split(self, split: Split) -> bool:
        """Whether the split holds a problem."""
        return len(self.problems(split)) > 0

    def dataset(self, split: Split) -> Any:
        """Problems of a split as tokens."""
        return _Items(self.problems(split), self.tokenizer)

    def collate(self, split: Split) -> Callable[[list[Any]], Any]:
        """Pads on the right."""
        return collate_parts

    def describe(self) -> dict[str, Any]:
        """Sizes."""
        return {"source": type(self).__name__, "splits": {name: len(self.problems(name)) for name in SPLITS}}


class _Items:
    def __init__(self, problems: list[Problem], tokenizer: Any) -> None:
        self.rows, self.tokenizer = problems, tokenizer

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        number = key[1]
        row = self.rows[number]

        def ids(text: str) -> list[int]:
            return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

        bos = self.tokenizer.bos_token_id
        head = [*([] if bos is None else [bos]), *ids(row.head)]
        parts = (head, ids(row.context), ids(row.tail), [*ids(row.answer), self.tokenizer.eos_token_id])
        item: dict[str, Any] = {part: torch.tensor(found, dtype=torch.int64) for part, found in zip(PARTS, parts)}
        group = int(digest(row.context)[:15], 16)
        item["id"], item["group"], item["span"] = torch.tensor(number), torch.tensor(group), torch.tensor([-1, -1])
        item["questions"] = ProblemQuestion(number, row)
        return item


class SyntheticTasks(_Problems):
    """The synthetic tasks of the tiny model: `reasoning`, `study`, `in_context`, `personalisation` and others.

    Solutions of `reasoning` are long: the method needs `max_new_tokens` of a few hundred.

    Args:
        tasks: Names; their difficulties take turns.
        counts: Problems of each task for train, val and test.
        data_seed: Seed of the generators.
        batch_size: Problems of a training batch on each rank.
        eval_batch_size: Problems of an evaluation batch.
        num_workers: Loader processes.
        seed: Seed of the order.
    """

    def __init__(
        self,
        tasks: tuple[str, ...] = ("reasoning",),
        counts: tuple[int, int, int] = (1000, 50, 100),
        data_seed: int = seeds.DEFAULT_SEED,
        batch_size: int = 8,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int = seeds.DEFAULT_SEED,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, num_workers, shuffle=True, seed=seed)
        graded = [name for name, task in TASKS.items() if task.grade is not None]
        if unknown := [name for name in tasks if name not in graded]:
            raise UserError(f"data.tasks: {unknown[0]!r} is not one of {', '.join(graded)}")
        if not tasks or min(counts) < 0:
            raise UserError(f"data.tasks and data.counts: need a task, and no negative counts, got {list(counts)}")
        self.names, self.counts, self.data_seed = tuple(tasks), counts, data_seed
        self._drawn: dict[Split, list[Problem]] = {}

    def problems(self, split: Split) -> list[Problem]:
        """Problems of a split, task by task."""
        if split not in self._drawn:
            count = self.counts[SPLITS.index(split)]
            self._drawn[split] = [
                _synthetic(name, example(name, split, self.data_seed, number, levels[number % len(levels)].name))
                for name in self.names
                for levels in [TASKS[name].levels]
                for number in range(count)
            ]
        return self._drawn[split]

    def data_hash(self) -> str:
        """Name of tasks, sizes and seed."""
        return digest([self.names, self.counts, self.data_seed])


def _synthetic(task: str, item: Example) -> Problem:
    turn, grade = item.turns[0], TASKS[task].grade
    assert grade is not None
    shown = _number if task == "reasoning" else answer_text
    # No closures: loader processes pickle what they send.
    right = functools.partial(_graded, grade, item)
    answer = document_text(list(turn.answer))
    return Problem(item.head, item.material, turn.query + turn.lead, answer, item.gold, task, right, shown)


def _graded(grade: Callable[[str, Example], bool], item: Example, completion: str) -> bool:
    return grade(completion, item)


class SolvedProblems(_Problems):
    """Word problems after a few solved ones, which are the context: GSM8K has no other that could be compressed.

    Args:
        path: JSON list or JSONL with `question` and `answer`, a solution that ends with `#### N`; or
            `hub:owner/name:config` (`hub:openai/gsm8k:main`).
        eval_path: Such a file with the test problems; the test share of `split` then trains.
        shots: Solved problems in each context, drawn from the training problems, the same ones in every epoch.
        split: Shares for train, val and test.
        limit: Most problems of each split; 0 takes all.
        data_seed: Seed of split and draws.
        batch_size: Problems of a training batch on each rank.
        eval_batch_size: Problems of an evaluation batch.
        num_workers: Loader processes.
        seed: Seed of the order.
    """

    def __init__(
        self,
        path: str,
        eval_path: str | None = None,
        shots: int = 4,
        split: tuple[float, float, float] = (0.9, 0.05, 0.05),
        limit: int = 0,
        data_seed: int = seeds.DEFAULT_SEED,
        batch_size: int = 8,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int = seeds.DEFAULT_SEED,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, num_workers, shuffle=True, seed=seed)
        if shots < 1:
            raise UserError(f"data.shots must be at least 1, got {shots}")
        check_split(split)
        self.path, self.eval_path, self.shots, self.split = path, eval_path, shots, split
        self.limit, self.data_seed = limit, data_seed

    @functools.cached_property
    def solved(self) -> dict[Split, list[tuple[str, str]]]:
        """Questions and solutions by split.

        Raises:
            UserError: A source is missing or malformed, or too small for the shots.
        """
        rows = load_solved(self.path)
        order = torch.randperm(len(rows), generator=seeds.generator(self.data_seed)).tolist()
        first, second = (round(len(rows) * sum(self.split[:n])) for n in (1, 2))
        train, val, test = ([rows[i] for i in part] for part in (order[:first], order[first:second], order[second:]))
        if self.eval_path is not None:
            train, test = train + test, load_solved(self.eval_path)
        if len(train) <= self.shots:
            raise UserError(f"data.shots: {self.path} has {len(train)} training problems, too few for {self.shots}")
        return {"train": train, "val": val, "test": test}

    def problems(self, split: Split) -> list[Problem]:
        """Problems of a split, each after solved ones that it is not among."""
        return self._problems[split]

    @functools.cached_property
    def _problems(self) -> dict[Split, list[Problem]]:
        found: dict[Split, list[Problem]] = {}
        pool = self.solved["train"]
        for split, rows in self.solved.items():
            found[split] = []
            for number, row in enumerate(rows[: self.limit or None]):
                draw = seeds.generator(self.data_seed, SPLITS.index(split), number)
                chosen = torch.randperm(len(pool), generator=draw)[: self.shots + 1].tolist()
                shots = [pool[i] for i in chosen if pool[i] != row][: self.shots]
                found[split].append(_after(shots, *row))
        return found

    def data_hash(self) -> str:
        """Name of the problems and their split."""
        return digest([self.solved, self.shots, self.limit, self.data_seed])


def load_solved(source: str) -> list[tuple[str, str]]:
    """Questions and solutions.

    Raises:
        UserError: The source is missing or malformed; names the file, the place in it and the key.
    """
    hub = source.startswith(HUB)
    rows = []
    for where, row in hub_records(source.removeprefix(HUB), "train") if hub else read_records(Path(source)):
        question, answer = row.get("question"), row.get("answer")
        if not isinstance(question, str) or not isinstance(answer, str):
            raise UserError(f"{where}: keys 'question' and 'answer' must be texts")
        if final_answer(answer) is None:
            raise UserError(f"{where}: the answer has no final answer after ####")
        rows.append((question.strip(), answer.strip()))
    return rows


def _after(shots: list[tuple[str, str]], question: str, solution: str) -> Problem:
    context = "\n\n".join(f"Question: {asked}\nAnswer: {answer}" for asked, answer in shots)
    gold = final_answer(solution) or ""
    right = functools.partial(_same_number, gold)
    return Problem("", context, f"\n\nQuestion: {question}\nAnswer:", f" {solution}", gold, "solved", right, _number)


def _number(completion: str) -> str:
    """The final answer, before the model goes on with a question of its own."""
    return extract_answer(completion.split("\n\nQuestion:")[0]) or ""


def _same_number(gold: str, completion: str) -> bool:
    return same_answer(_number(completion), gold)
