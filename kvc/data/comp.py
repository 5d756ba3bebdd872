"""COMP traces as token-level labels: after which reasoning tokens does a compression follow?"""

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch.nn.utils.rnn import pad_sequence

from kvc.core import seeds
from kvc.core.datamodule import KvcDataModule, Split, check_split
from kvc.core.files import digest
from kvc.data.prompts import Template, render_prompt
from kvc.data.traces import Trace, filter_valid, load_traces, synthetic_traces
from kvc.errors import UserError

SYNTHETIC = "synthetic:reasoning"
PAD_LABEL = -100
SENTENCE_END = re.compile(r"[.!?](?=\s|$)")


@dataclass(frozen=True)
class LabelledTrace:
    """One trace as the classifier sees it.

    Attributes:
        id: Number of the trace in the whole data set.
        prompt_ids: Tokens before the reasoning: BOS, instructions, question.
        ids: Tokens of the reasoning, made from the text without markers.
        ends: For each reasoning token, the character offset in `text` where it ends.
        labels: 1 at each reasoning token after which a COMP follows, else 0.
        newline: 1 at the last visible token before each line break: where the newline rule fires.
        sentence: 1 at each token that ends a sentence: where the sentence rule fires.
        text: The reasoning without markers.
    """

    id: int
    prompt_ids: list[int]
    ids: list[int]
    ends: list[int]
    labels: list[int]
    newline: list[int]
    sentence: list[int]
    text: str


class CompTraces(KvcDataModule):
    """Traces with `<COMP>` markers, from a file, the Hub or the synthetic generator.

    Batch, over the reasoning tokens of B traces (T of the longest):
    `id` `[B]`; `rows` `[B, T]`, the position of each token in the concatenation of all traces; `labels` `[B, T]`,
    1 / 0 / -100 on padding; `draw` `[B, T]`, uniform numbers made anew for each (seed, epoch, trace), from which
    a method samples tokens.

    Args:
        path: `synthetic:reasoning`, a JSON list or JSONL file, or `hub:owner/name`.
        counts: Numbers of synthetic traces for train, val and test.
        steps: Fewest and most calculations of a synthetic trace.
        split: Shares of a file's traces for train, val and test.
        train_ratio: Share for train instead of `split`; val and test halve the rest.
        split_seed: Seed of the split of a file, and of the synthetic generator.
        limit: Use only the first so many records of a file; 0 uses all.
        only_valid: Drop traces that fail validation (wrong answer, misplaced marker ...), with counted reasons.
        template: How the question is presented; `chat` uses the tokenizer's chat template.
        max_length: Longest prompt plus reasoning in tokens; longer traces are dropped and counted.
        batch_size: Traces of a training batch on each rank.
        eval_batch_size: Traces of an evaluation batch.
        num_workers: Loader processes.
        seed: Seed of order and draws.
    """

    gives: ClassVar[tuple[str, ...]] = ("id", "rows", "labels", "draw")

    def __init__(
        self,
        path: str = SYNTHETIC,
        counts: tuple[int, int, int] = (1600, 200, 200),
        steps: tuple[int, int] = (2, 8),
        split: tuple[float, float, float] = (0.8, 0.1, 0.1),
        split_seed: int = seeds.DEFAULT_SEED,
        limit: int = 0,
        only_valid: bool = True,
        template: Template = "plain",
        max_length: int = 2048,
        batch_size: int = 64,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int = seeds.DEFAULT_SEED,
        train_ratio: float | None = None,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, num_workers, shuffle=True, seed=seed)
        if train_ratio is not None:
            if path == SYNTHETIC:
                raise UserError("data.train_ratio: synthetic traces are numbered by data.counts")
            if not 0 < train_ratio < 1:
                raise UserError(f"data.train_ratio must lie between 0 and 1, got {train_ratio}")
            split = (train_ratio, (1 - train_ratio) / 2, (1 - train_ratio) / 2)
        check_split(split)
        if min(counts) < 0:
            raise UserError(f"data.counts must not be negative, got {list(counts)}")
        if not 1 <= steps[0] <= steps[1]:
            raise UserError(f"data.steps must be the fewest and the most calculations, at least 1, got {list(steps)}")
        self.path = path
        self.counts, self.steps, self.split, self.split_seed = counts, steps, split, split_seed
        self.limit, self.only_valid, self.template, self.max_length = limit, only_valid, template, max_length
        self.dropped: dict[str, int] = {}
        self.tokenizer: Any = None
        self._labelled: list[LabelledTrace] | None = None

    # ------------------------------------------------------------------ reading

    @functools.cached_property
    def traces(self) -> dict[Split, list[Trace]]:
        """Valid traces by split."""
        names: tuple[Split, Split, Split] = ("train", "val", "test")
        if self.path == SYNTHETIC:
            return {
                name: synthetic_traces(count, self.split_seed, name, self.steps)
                for name, count in zip(names, self.counts)
            }
        traces = load_traces(self.path)
        traces = traces[: self.limit] if self.limit else traces
        if self.only_valid:
            traces, reasons = filter_valid(traces)
            self.dropped.update(reasons)
        if not any(trace.marks for trace in traces):
            raise UserError(
                f"data.path: {self.path} holds no valid trace with a <COMP> marker (dropped: {self.dropped})"
            )
        # Several annotations of one question must not lie on both sides.
        questions = list(dict.fromkeys(trace.question for trace in traces))
        order = torch.randperm(len(questions), generator=seeds.generator(self.split_seed)).tolist()
        first = round(len(questions) * self.split[0])
        second = round(len(questions) * (self.split[0] + self.split[1]))
        by_question: dict[str, list[Trace]] = {}
        for trace in traces:
            by_question.setdefault(trace.question, []).append(trace)
        parts = (order[:first], order[first:second], order[second:])
        return {name: [t for i in part for t in by_question[questions[i]]] for name, part in zip(names, parts)}

    def setup(self, stage: str) -> None:
        """Tokenise with the tokenizer of the method's base model."""
        if self._labelled is None:
            self.tokenizer = self.trainer.lightning_module.tokenizer  # type: ignore[union-attr]
            self._label()

    def _label(self) -> None:
        labelled: list[LabelledTrace] = []
        self._ranges: dict[Split, range] = {}
        for name, traces in self.traces.items():
            begin = len(labelled)
            for trace in traces:
                item = label_trace(trace, len(labelled), self.tokenizer, self.template)
                if len(item.prompt_ids) + len(item.ids) > self.max_length:
                    self.dropped["too_long"] = self.dropped.get("too_long", 0) + 1
                    continue
                labelled.append(item)
            self._ranges[name] = range(begin, len(labelled))
        if not self._ranges["train"]:
            raise UserError(f"data.path: {self.path} leaves no training trace (dropped: {self.dropped})")
        self._labelled = labelled
        sizes = torch.tensor([0] + [len(item.ids) for item in labelled])
        self.starts: list[int] = sizes.cumsum(0).tolist()

    @property
    def labelled(self) -> list[LabelledTrace]:
        """All traces in the order of their ids: train, val, test."""
        assert self._labelled is not None, "setup comes first"
        return self._labelled

    def train_rate(self) -> float:
        """Share of the training split's reasoning tokens that a COMP follows."""
        items = [self.labelled[i] for i in self._ranges["train"]]
        return sum(sum(item.labels) for item in items) / sum(len(item.labels) for item in items)

    def has_split(self, split: Split) -> bool:
        """Whether the split holds at least one trace."""
        return len(self.traces[split] if self._labelled is None else self._ranges[split]) > 0

    def data_hash(self) -> str:
        """Name of the traces' contents, their split and their presentation."""
        records = {name: [trace.record() for trace in part] for name, part in self.traces.items()}
        return digest([records, self.template, self.max_length])

    def describe(self) -> dict[str, Any]:
        """Source, sizes and what was dropped."""
        sizes = {name: len(part) for name, part in self._ranges.items()}
        return {"source": self.path, "template": self.template, "splits": sizes, "dropped": dict(self.dropped)}

    # ------------------------------------------------------------------ batches

    def dataset(self, split: Split) -> Any:
        """Traces of a split."""
        return _Traces(self, self._ranges[split])

    def collate(self, split: Split) -> Callable[[list[Any]], Any]:
        """Pads on the right."""
        return _collate


class _Traces:
    def __init__(self, data: CompTraces, ids: range) -> None:
        self.data, self.ids = data, ids

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, torch.Tensor]:
        epoch, index = key
        item = self.data.labelled[self.ids[index]]
        start, count = self.data.starts[item.id], len(item.ids)
        return {
            "id": torch.tensor(item.id),
            "rows": torch.arange(start, start + count),
            "labels": torch.tensor(item.labels),
            "draw": torch.rand(count, generator=seeds.generator(self.data.seed, epoch, item.id)),
        }


def _collate(items: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    def pad(key: str, value: float) -> torch.Tensor:
        return pad_sequence([item[key] for item in items], batch_first=True, padding_value=value)

    ids = torch.stack([item["id"] for item in items])
    return {"id": ids, "rows": pad("rows", 0), "labels": pad("labels", PAD_LABEL), "draw": pad("draw", 1.0)}


def label_trace(trace: Trace, number: int, tokenizer: Any, template: Literal["plain", "chat"]) -> LabelledTrace:
    """Tokenise one trace without its markers and map every marker to a token.

    A marker belongs to the token that holds the last visible character before it. The tokens are those that the model
    meets at inference, where no marker is in the text: nothing about them tells where a marker was.
    """
    prompt = render_prompt(trace.question, template, tokenizer)
    prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    if template == "plain" and tokenizer.bos_token_id is not None:
        prompt_ids = [tokenizer.bos_token_id, *prompt_ids]
    text = trace.text
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ends = [end for _, end in encoded["offset_mapping"]]
    lines = [len(text[: match.start()].rstrip()) for match in re.finditer(r"\n", text)]
    sentences = [match.end() for match in SENTENCE_END.finditer(text)]
    return LabelledTrace(
        id=number,
        prompt_ids=prompt_ids,
        ids=encoded["input_ids"],
        ends=ends,
        labels=_flags(ends, trace.marks),
        newline=_flags(ends, [offset for offset in lines if offset]),
        sentence=_flags(ends, sentences),
        text=text,
    )


def _flags(ends: Sequence[int], offsets: Sequence[int]) -> list[int]:
    """1 at the token that completes the character before each offset: of several that share its bytes, the last."""
    flags = [0] * len(ends)
    if not ends:
        return flags
    bounds = torch.tensor(ends)
    first = torch.searchsorted(bounds, torch.tensor(list(offsets), dtype=torch.long)).clamp(max=len(ends) - 1)
    for position in (torch.searchsorted(bounds, bounds[first], right=True) - 1).tolist():
        flags[position] = 1
    return flags
