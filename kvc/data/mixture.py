"""Several question sets as one: mixed in training, told apart in evaluations."""

import bisect
from collections.abc import Callable
from itertools import accumulate
from typing import Any, ClassVar, NamedTuple

import torch

from kvc.core import seeds
from kvc.core.datamodule import KvcDataModule, Split
from kvc.core.files import digest
from kvc.data.parts import KEYS, collate_parts
from kvc.data.squad.example import SquadExample
from kvc.data.squad.grading import Score
from kvc.errors import UserError

SPLITS: tuple[Split, Split, Split] = ("train", "val", "test")


class TaskQuestion(NamedTuple):
    """A question that is reported with its task, and graded as its own set says.

    Attributes:
        id: Its number in the mixture.
        group: Name of the task.
        question: The question in its own set.
    """

    id: int
    group: str
    question: Any

    @property
    def prompt(self) -> str:
        """Everything before the answer."""
        return str(self.question.prompt)

    @property
    def bare_prompt(self) -> str | None:
        """The prompt without the context."""
        bare: str | None = self.question.bare_prompt
        return bare

    @property
    def gold(self) -> str:
        """The first gold answer."""
        return str(self.question.gold)

    @property
    def example(self) -> SquadExample:
        """Question, context and gold answers."""
        example: SquadExample = self.question.example
        return example

    def score(self, completion: str) -> Score:
        """Grade as the set does."""
        found: Score = self.question.score(completion)
        return found


class TaskMixture(KvcDataModule):
    """Multi-task training: each row is drawn from task i with probability n_i^alpha / sum_j n_j^alpha, then within it.

    Evaluations hold all questions of all tasks; their `group` is the name of the task.

    Batch: see `kvc.data.parts.collate_parts`.

    Args:
        tasks: Question sets by name, each with batches of the same keys; their batch sizes have no effect.
        alpha: 1 draws in proportion to the sizes of the tasks, 0 draws all tasks alike.
        rows: Training rows of an epoch; null for as many as all tasks have together.
        batch_size: Rows of a training batch on each rank.
        eval_batch_size: Rows of an evaluation batch.
        num_workers: Loader processes.
        seed: Seed of draws.
    """

    gives: ClassVar[tuple[str, ...]] = KEYS

    def __init__(
        self,
        tasks: dict[str, KvcDataModule],
        alpha: float = 0.5,
        rows: int | None = None,
        batch_size: int = 8,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int = seeds.DEFAULT_SEED,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, num_workers, shuffle=False, seed=seed)
        if not tasks:
            raise UserError("data.tasks: there is none to mix")
        for name, task in tasks.items():
            if missing := set(KEYS) - set(task.gives):
                raise UserError(f"data.tasks.{name}: {type(task).__name__} gives no '{min(missing)}'")
        if alpha < 0:
            raise UserError(f"data.alpha must not be negative, got {alpha}")
        if rows is not None and rows < 1:
            raise UserError(f"data.rows must be at least 1, got {rows}")
        self.tasks, self.alpha, self.rows = tasks, alpha, rows

    def setup(self, stage: str) -> None:
        """Set every task up with the same trainer and seed."""
        for task in self.tasks.values():
            task.trainer, task.seed = self.trainer, self.seed
            task.setup(stage)

    def with_split(self, split: Split) -> dict[str, KvcDataModule]:
        """The tasks that have rows in a split."""
        return {name: task for name, task in self.tasks.items() if task.has_split(split)}

    def has_split(self, split: Split) -> bool:
        """Whether any task has."""
        return bool(self.with_split(split))

    def dataset(self, split: Split) -> Any:
        """Draws for training, all rows one task after the other otherwise."""
        parts = {name: task.dataset(split) for name, task in self.with_split(split).items()}
        return _Drawn(parts, self) if split == "train" else _Joined(parts)

    def collate(self, split: Split) -> Callable[[list[Any]], Any]:
        """Pads on the right."""
        return collate_parts

    def shares(self, sizes: list[int]) -> torch.Tensor:
        """Probability of each task, from the numbers of their rows."""
        weights = torch.tensor(sizes, dtype=torch.float64) ** self.alpha
        return weights / weights.sum()

    def data_hash(self) -> str:
        """Name of all tasks' contents and of how they are mixed."""
        hashes = {name: task.data_hash() for name, task in self.tasks.items()}
        return digest([hashes, self.alpha, self.rows])

    def describe(self) -> dict[str, Any]:
        """What the tasks say of themselves."""
        return {"source": "mixture", "tasks": {name: task.describe() for name, task in self.tasks.items()}}


class _Joined:
    """All rows of all parts."""

    def __init__(self, parts: dict[str, Any]) -> None:
        self.names, self.parts = list(parts), list(parts.values())
        self.ends = list(accumulate(len(part) for part in self.parts))

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        epoch, number = key
        part = bisect.bisect_right(self.ends, number)
        return self.row(part, epoch, number - (self.ends[part - 1] if part else 0), number)

    def row(self, part: int, epoch: int, row: int, number: int) -> dict[str, Any]:
        item = self.parts[part][epoch, row]
        question = TaskQuestion(number, self.names[part], item["questions"])
        return {**item, "id": torch.tensor(number), "questions": question}


class _Drawn(_Joined):
    """Rows drawn anew in each epoch, each a function of (seed, epoch, number)."""

    def __init__(self, parts: dict[str, Any], data: TaskMixture) -> None:
        super().__init__(parts)
        self.seed, self.count = data.seed, data.rows or super().__len__()
        self.shares = data.shares([len(part) for part in self.parts])

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        epoch, number = key
        draw = seeds.generator(self.seed, epoch, number)
        part = int(torch.multinomial(self.shares, 1, generator=draw))
        return self.row(part, epoch, int(torch.randint(len(self.parts[part]), (), generator=draw)), number)
