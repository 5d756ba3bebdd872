"""SQuAD as batches: head, context, tail and answer of each question as tokens of their own."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import torch

from kvc.core import seeds
from kvc.core.datamodule import KvcDataModule, Split, check_split
from kvc.core.files import digest
from kvc.data.parts import KEYS, PARTS, collate_parts
from kvc.data.squad.encoding import Encoded, cut, encode, whole_prompt, window
from kvc.data.squad.example import SquadExample
from kvc.data.squad.official import load_squad
from kvc.data.squad.passages import synthetic_squad
from kvc.data.squad.question import SquadQuestion
from kvc.data.squad.template import PRESETS, Preset, SquadTemplate
from kvc.data.traces import HUB
from kvc.errors import UserError

SYNTHETIC = "synthetic:passages"
COUNTS = (4000, 200, 400)
SPLITS: tuple[Split, Split, Split] = ("train", "val", "test")


class Squad(KvcDataModule):
    """Questions about passages: official JSON (v1.1, v2.0), the Hub, or synthetic passages.

    Batch of B questions, each part right-padded with 0 to its own longest: `head_ids`, `context_ids`, `tail_ids`,
    `answer_ids` int64 `[B, P]` and `head_mask`, `context_mask`, `tail_mask`, `answer_mask` bool `[B, P]`. A prompt is
    head, context, tail; the head starts with BOS, the answer ends with EOS. `id` `[B]`, number in the split; `group`
    `[B]`, number of the text, which questions about one text share; `span` `[B, 2]`, in training the first token of an
    answer in the context and the one after its last, else -1; `questions`, a list of `SquadQuestion`.

    A context that is longer than `context_length` is cut in training to a random window that holds the answer, anew in
    each epoch. In evaluations the answer's place is never used: the context comes whole, to be compressed in pieces, or
    is cut on the right.

    Args:
        path: `synthetic:passages`, an official JSON file, or `hub:owner/name` (`hub:rajpurkar/squad`).
        eval_path: Official JSON file with the test questions; the test share of `split` then trains. On the Hub the
            validation split is the test data.
        counts: Most questions for train, val and test, drawn by `split_seed`; 0 takes all. Synthetic passages have as
            many, (4000, 200, 400) if null.
        split: Shares of a source's contexts for train, val and test.
        split_seed: Seed of split, draw and synthetic generator.
        facts: Fewest and most facts of a synthetic passage.
        unanswerable: Share of synthetic questions that the passage does not answer.
        template: `plain`, `seed` (question first), `chat`, or the parts themselves.
        no_answer: What the model says where the context gives no answer.
        scope: What is compressed: the `context`, reusable for any question, or the whole `prompt`.
        context_length: Most tokens of a context that are read at once.
        long_eval: What evaluations do with a longer one: leave it whole (`chunks`) or cut it (`truncate`).
        max_answer: Most tokens of a training answer, without EOS; longer ones are dropped and counted.
        batch_size: Questions of a training batch on each rank.
        eval_batch_size: Questions of an evaluation batch.
        num_workers: Loader processes.
        seed: Seed of order and windows.
    """

    gives: ClassVar[tuple[str, ...]] = KEYS

    def __init__(
        self,
        path: str = SYNTHETIC,
        eval_path: str | None = None,
        counts: tuple[int, int, int] | None = None,
        split: tuple[float, float, float] = (0.8, 0.1, 0.1),
        split_seed: int = seeds.DEFAULT_SEED,
        facts: tuple[int, int] = (4, 30),
        unanswerable: float = 0.0,
        template: Preset | SquadTemplate = "plain",
        no_answer: str = "unknown",
        scope: Literal["context", "prompt"] = "context",
        context_length: int = 512,
        long_eval: Literal["chunks", "truncate"] = "chunks",
        max_answer: int = 32,
        batch_size: int = 8,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int = seeds.DEFAULT_SEED,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, num_workers, shuffle=True, seed=seed)
        synthetic = path == SYNTHETIC
        check_split(split)
        if counts is not None and min(counts) < 0:
            raise UserError(f"data.counts must not be negative, got {list(counts)}")
        if eval_path is not None and (synthetic or path.startswith(HUB)):
            raise UserError("data.eval_path: has no effect, only a JSON file has its test questions in another one")
        if not 1 <= facts[0] <= facts[1]:
            raise UserError(f"data.facts must be the fewest and the most facts, at least 1, got {list(facts)}")
        if not 0 <= unanswerable <= 1:
            raise UserError(f"data.unanswerable must lie between 0 and 1, got {unanswerable}")
        for name, value in (("context_length", context_length), ("max_answer", max_answer)):
            if value < 1:
                raise UserError(f"data.{name} must be at least 1, got {value}")
        self.path, self.eval_path, self.split, self.split_seed = path, eval_path, split, split_seed
        self.counts = counts or (COUNTS if synthetic else (0, 0, 0))
        self.facts, self.unanswerable = facts, unanswerable
        self.template = PRESETS[template] if isinstance(template, str) else template
        self.no_answer, self.scope = no_answer, scope
        self.context_length, self.long_eval, self.max_answer = context_length, long_eval, max_answer
        self.dropped: dict[str, int] = {}
        self.tokenizer: Any = None
        self._rows: dict[Split, list[tuple[SquadExample, Encoded]]] = {}

    # ------------------------------------------------------------------ reading

    @functools.cached_property
    def examples(self) -> dict[Split, list[SquadExample]]:
        """Questions by split; all questions about one context are in the same."""
        if self.path == SYNTHETIC:
            return {
                name: synthetic_squad(name, count, self.split_seed, self.facts, self.unanswerable)
                for name, count in zip(SPLITS, self.counts)
            }
        parts = _by_context(self.read(self.path), self.split, self.split_seed)
        test: list[SquadExample] | None = None
        if self.path.startswith(HUB):
            test = self.read(self.path, "validation")
        elif self.eval_path is not None:
            test = self.read(self.eval_path)
        if test is not None:
            parts = (parts[0] + parts[2], parts[1], test)
        return {name: _some(part, count, self.split_seed) for name, part, count in zip(SPLITS, parts, self.counts)}

    def read(self, source: str, split: str = "train") -> list[SquadExample]:
        """Questions of a file or of a split on the Hub; see `load_squad`."""
        return load_squad(source, split)

    def setup(self, stage: str) -> None:
        """Take the tokenizer of the method's base model."""
        self.tokenizer = self.trainer.lightning_module.tokenizer  # type: ignore[union-attr]

    def rows(self, split: Split) -> list[tuple[SquadExample, Encoded]]:
        """The questions of a split and their tokens; training questions that do not fit are left out and counted.

        Raises:
            UserError: If no training question is left.
        """
        if split not in self._rows:
            examples = self.examples[split]
            rows = list(zip(examples, encode(examples, self.tokenizer, self.template, self.no_answer)))
            self._rows[split] = self._fitting(rows) if split == "train" else rows
        return self._rows[split]

    def _fitting(self, rows: list[tuple[SquadExample, Encoded]]) -> list[tuple[SquadExample, Encoded]]:
        fitting = []
        for example, encoded in rows:
            reason = None
            if len(encoded.answer) - 1 > self.max_answer:
                reason = "answer_too_long"
            elif encoded.spans and encoded.spans[0][1] - encoded.spans[0][0] > self.context_length:
                reason = "span_too_long"
            if reason is None:
                fitting.append((example, encoded))
            else:
                self.dropped[reason] = self.dropped.get(reason, 0) + 1
        if not fitting:
            raise UserError(f"data.path: {self.path} leaves no training question (dropped: {self.dropped})")
        return fitting

    @property
    def has_unanswerable(self) -> bool:
        """Whether any question has no answer in its context."""
        return any(not example.answerable for part in self.examples.values() for example in part)

    def answer_lost(self, split: Split) -> float:
        """Share of a split's answerable questions none of whose answers is left after `truncate`."""
        spans = [encoded.spans for _, encoded in self.rows(split) if encoded.spans]
        lost = [all(stop > self.context_length for _, stop in found) for found in spans]
        return sum(lost) / max(1, len(lost)) if self.long_eval == "truncate" else 0.0

    def has_split(self, split: Split) -> bool:
        """Whether the split holds at least one question."""
        return len(self.examples[split]) > 0

    def data_hash(self) -> str:
        """Name of the questions, their split and their presentation."""
        settings = [vars(self.template), self.no_answer, self.scope, self.context_length, self.long_eval]
        return digest([self.examples, settings, self.max_answer])

    def describe(self) -> dict[str, Any]:
        """Source, sizes, what was dropped, and the share of answers that truncation loses."""
        # A split that nobody used is not tokenised for its size.
        sizes = {name: len(self._rows.get(name, self.examples[name])) for name in SPLITS if self.has_split(name)}
        lost = {name: self.answer_lost(name) for name in self._rows if name != "train"}
        about = {"source": self.path, "splits": sizes, "dropped": dict(self.dropped)}
        return about | ({"answer_lost": lost} if self.long_eval == "truncate" else {})

    # ------------------------------------------------------------------ batches

    def dataset(self, split: Split) -> Any:
        """Questions of a split."""
        return _Questions(self, split)

    def collate(self, split: Split) -> Callable[[list[Any]], Any]:
        """Pads on the right."""
        return collate_parts

    def fitted(self, encoded: Encoded, split: Split, epoch: int, number: int) -> Encoded:
        """The question with as much of its context as is read, in the scope that is compressed."""
        if split == "train":
            encoded = window(encoded, self.context_length, seeds.generator(self.seed, epoch, number))
        elif self.long_eval == "truncate":
            encoded = cut(encoded, 0, self.context_length)
        return encoded if self.scope == "context" else whole_prompt(encoded, self.tokenizer.bos_token_id)


class _Questions:
    def __init__(self, data: Squad, split: Split) -> None:
        self.data, self.split = data, split
        self.no_answer = data.no_answer if data.has_unanswerable else None

    def __len__(self) -> int:
        return len(self.data.rows(self.split))

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        epoch, number = key
        example, encoded = self.data.rows(self.split)[number]
        fitted = self.data.fitted(encoded, self.split, epoch, number)
        prompt = encoded.rendered.prompt(example.context)
        item: dict[str, Any] = {part: torch.tensor(getattr(fitted, part), dtype=torch.int64) for part in PARTS}
        item["id"], item["group"] = torch.tensor(number), torch.tensor(example.group)
        known = fitted.spans[:1] if self.split == "train" else ()
        item["span"] = torch.tensor(known[0] if known else (-1, -1))
        item["questions"] = SquadQuestion(number, prompt, encoded.rendered.bare, example, self.no_answer)
        return item


def _by_context(
    examples: Sequence[SquadExample], shares: tuple[float, float, float], seed: int
) -> tuple[list[SquadExample], list[SquadExample], list[SquadExample]]:
    by_context: dict[str, list[SquadExample]] = {}
    for example in examples:
        by_context.setdefault(example.context, []).append(example)
    groups = list(by_context.values())
    order = torch.randperm(len(groups), generator=seeds.generator(seed)).tolist()
    first, second = round(len(groups) * shares[0]), round(len(groups) * (shares[0] + shares[1]))
    train, val, test = (
        [example for i in part for example in groups[i]]
        for part in (order[:first], order[first:second], order[second:])
    )
    return train, val, test


def _some(examples: list[SquadExample], count: int, seed: int) -> list[SquadExample]:
    """Random `count` of the examples, in a random order; all of them in theirs for 0."""
    if not count or count >= len(examples):
        return examples
    order = torch.randperm(len(examples), generator=seeds.generator(seed, 1))[:count]
    return [examples[i] for i in order.tolist()]
