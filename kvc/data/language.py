"""Synthetic text for training a small language model, and held-out items that grade it."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch

from kvc.core import seeds
from kvc.core.datamodule import KvcDataModule, Rows, Split
from kvc.core.files import digest
from kvc.data.answers import extract_answer
from kvc.data.questions import Judged
from kvc.data.synthetic.base import Document, rng_for
from kvc.data.synthetic.curriculum import SCHEDULE, Mixture
from kvc.data.synthetic.example import EOS, Example, plain
from kvc.data.synthetic.tasks import TASKS, example
from kvc.data.tokens import tokenize
from kvc.errors import UserError

PAD_LABEL = -100
GENERATOR_VERSION = 2


class Item(NamedTuple):
    """A held-out item.

    Attributes:
        id: Its number in the split.
        task: Name of the task.
        level: Name of the difficulty.
        example: Context, query and answer.
    """

    id: int
    task: str
    level: str
    example: Example

    @property
    def group(self) -> str:
        """Task and difficulty, e.g. `reasoning 2-4`."""
        return f"{self.task} {self.level}"

    @property
    def prompt(self) -> str:
        """Everything before the answer."""
        return self.example.prompt

    @property
    def bare_prompt(self) -> str:
        """The question without its context."""
        return self.example.head + (self.example.turns[0].query + self.example.turns[0].lead).lstrip()

    @property
    def gold(self) -> str:
        """The right answer."""
        return self.example.gold

    def judge(self, completion: str) -> Judged:
        """Grade as the task says; of a solution only the final number counts."""
        grade = TASKS[self.task].grade
        if grade is None:
            raise UserError(f"data.tasks: answers of {self.task} are not graded one by one")
        answer = extract_answer(completion) if self.task == "reasoning" else completion.strip().split("\n", 1)[0]
        return Judged(answer, grade(completion, self.example))


class SyntheticText(KvcDataModule):
    """The tiny model's curriculum; every batch is a pure function of (seed, its number).

    A training batch holds documents of similar length with about `tokens_per_batch` tokens, right-padded:
    `input_ids`, `labels` `[B, T]` (-100 on padding) and `weights` `[B, T]`, how much each token counts.

    Args:
        steps: Number of training batches; the curriculum is stretched over them.
        tokens_per_batch: Padded tokens of a training batch.
        max_length: Longer documents are drawn again.
        context_weight: Loss weight of tokens that are not answers, at the start and at the end of the training.
        result_weight: Loss weight of numbers that must be computed or copied, and of short answers.
        held_out: Items of each difficulty of each task in the validation and the test split.
        tasks: The tasks whose items are held out; all of them if empty.
        levels: The difficulties that are held out, such as `9-16`; all of each task if empty.
        eval_batch_size: Rows of an evaluation batch.
        num_workers: Loader processes.
        seed: Seed of everything drawn.
    """

    gives: ClassVar[tuple[str, ...]] = ("input_ids", "labels", "weights", "items", "questions")
    pool = 16
    """Batches that are drawn together and sorted by length."""

    def __init__(
        self,
        steps: int = 16000,
        tokens_per_batch: int = 2048,
        max_length: int = 4096,
        context_weight: tuple[float, float] = (0.1, 0.3),
        result_weight: float = 3.0,
        held_out: int = 100,
        tasks: Sequence[str] = (),
        levels: Sequence[str] = (),
        eval_batch_size: int = 50,
        num_workers: int = 0,
        seed: int = seeds.DEFAULT_SEED,
    ) -> None:
        super().__init__(None, eval_batch_size, num_workers, shuffle=False, seed=seed)
        self.steps = steps
        self.tokens_per_batch = tokens_per_batch
        self.max_length = max_length
        self.context_weight = context_weight
        self.result_weight = result_weight
        self.held_out = held_out
        unknown = [task for task in tasks if task not in TASKS]
        if unknown:
            raise UserError(f"data.tasks: {unknown[0]!r} is unknown, use {', '.join(TASKS)}")
        self.tasks = tuple(tasks) or tuple(TASKS)
        self.levels = tuple(levels)
        known = {level.name for task in self.tasks for level in TASKS[task].levels}
        if strange := [level for level in self.levels if level not in known]:
            raise UserError(f"data.levels: {strange[0]!r} is unknown, use {', '.join(sorted(known))}")
        self.tokenizer: Any = None

    def setup(self, stage: str) -> None:
        """Take the tokenizer of the model that is trained or measured."""
        self.tokenizer = self.trainer.lightning_module.tokenizer  # type: ignore[union-attr]

    def data_hash(self) -> str:
        """Name of the generators' version and settings."""
        settings = [
            GENERATOR_VERSION,
            self.seed,
            self.steps,
            self.tokens_per_batch,
            self.held_out,
            self.tasks,
            SCHEDULE,
        ]
        return digest([*settings, self.levels] if self.levels else settings)

    def describe(self) -> dict[str, Any]:
        """What the numbers belong to."""
        return {"source": "synthetic: curriculum", "train_batches": self.steps, "held_out": len(self.items("test"))}

    def has_split(self, split: Split) -> bool:
        """All splits are generated."""
        return True

    def dataset(self, split: Split) -> Any:
        """Batches for training; rows to grade otherwise."""
        if split == "train":
            return CurriculumBatches(self)
        rows = [(0, item) for item in self.items(split)]
        return Rows(rows)

    def collate(self, split: Split) -> Callable[[list[Any]], Any] | None:
        """Held-out rows become a batch with `id`, `group`, `prompt` and `answer` beside the tensors."""
        return None if split == "train" else self._held_out_batch

    def items(self, split: Split) -> list[Item]:
        """The held-out items of a split, the same for every model."""
        return _items(split, self.seed, self.held_out, self.tasks, self.levels)

    def encode(self, document: Document, context: float) -> tuple[list[int], list[float]]:
        """Token ids with BOS and, unless the text ends with it, EOS; and the loss weight of each."""
        tokens = tokenize(self.tokenizer, document)
        # In documents without results (passages, lookups) the short answers are what must be copied.
        answer = 1.0 if any(segment.kind == "result" for segment in document) else self.result_weight
        weight = {"context": context, "answer": answer, "result": self.result_weight}
        ids = [self.tokenizer.bos_token_id, *tokens.ids]
        weights = [0.0, *(weight[kind] for kind in tokens.kinds)]
        if not document[-1].text.endswith(f"{EOS}\n"):
            ids.append(self.tokenizer.eos_token_id)
            weights.append(1.0)
        return ids, weights

    def pad(self, rows: Sequence[tuple[list[int], list[float]]]) -> dict[str, torch.Tensor]:
        """Right-padded batch of encoded documents."""
        longest = max(len(ids) for ids, _ in rows)
        input_ids = torch.full((len(rows), longest), self.tokenizer.pad_token_id)
        labels = torch.full((len(rows), longest), PAD_LABEL)
        weights = torch.zeros(len(rows), longest)
        for row, (ids, values) in enumerate(rows):
            input_ids[row, : len(ids)] = labels[row, : len(ids)] = torch.tensor(ids)
            weights[row, : len(ids)] = torch.tensor(values)
        return {"input_ids": input_ids, "labels": labels, "weights": weights}

    def _held_out_batch(self, rows: list[tuple[int, Item]]) -> dict[str, Any]:
        items = [item for _, item in rows]
        encoded = [self.encode(plain(item.example), self.context_weight[1]) for item in items]
        batch: dict[str, Any] = dict(self.pad(encoded))
        batch["items"] = items
        # Grading single answers makes no sense for a task that has only likelihoods.
        batch["questions"] = [item for item in items if TASKS[item.task].grade]
        return batch


class CurriculumBatches:
    """Training batch number i, as a map-style dataset.

    Batches are drawn in pools: the documents of a pool are sorted by length and cut into batches of equal padded size,
    which wastes less than padding random documents and needs no packing masks.
    """

    def __init__(self, data: SyntheticText) -> None:
        self.data = data
        self._pool = functools.lru_cache(maxsize=2)(self._draw)

    def __len__(self) -> int:
        return self.data.steps

    def __getitem__(self, key: tuple[int, int]) -> dict[str, torch.Tensor]:
        epoch, index = key
        number, slot = divmod(index, self.data.pool)
        return self.data.pad(self._pool(epoch, number)[slot])

    def _draw(self, epoch: int, number: int) -> list[list[tuple[list[int], list[float]]]]:
        data = self.data
        rng = rng_for("curriculum", "train", data.seed, epoch * 1_000_003 + number)
        progress = min(1.0, number * data.pool / data.steps)
        late = max(0.0, 2 * progress - 1)
        context = data.context_weight[0] + late * (data.context_weight[1] - data.context_weight[0])
        rows: list[tuple[list[int], list[float]]] = []
        tokens = 0
        while tokens < data.tokens_per_batch * data.pool:
            row = data.encode(Mixture().document(rng, progress), context)
            if len(row[0]) <= data.max_length:
                rows.append(row)
                tokens += len(row[0])
        rows.sort(key=lambda row: len(row[0]))
        batches = _cut(rows, data.pool)
        rng.shuffle(batches)
        return batches


def _cut(rows: list[Any], parts: int) -> list[list[Any]]:
    """Cut rows, sorted by length, into `parts` batches of about equal padded size; a row is never split."""
    batches: list[list[Any]] = []
    left = sum(len(row[0]) for row in rows)
    rest = list(reversed(rows))  # the longest first: a batch of one row may be larger than its share
    for part in range(parts, 0, -1):
        batch = [rest.pop(0)]
        share = left / part
        while len(rest) >= part and len(batch[0][0]) * (len(batch) + 1) <= share:
            batch.append(rest.pop(0))
        if part == 1:
            batch += rest
        left -= sum(len(row[0]) for row in batch)
        batches.append(batch)
    return batches


@functools.lru_cache(maxsize=4)
def _items(split: Split, seed: int, count: int, tasks: tuple[str, ...], levels: tuple[str, ...]) -> list[Item]:
    drawn = (
        (task, level.name, example(task, split, seed, index, level.name))
        for task in tasks
        for level in TASKS[task].levels
        if not levels or level.name in levels
        for index in range(count)
    )
    return [Item(number, task, level, item) for number, (task, level, item) in enumerate(drawn)]
