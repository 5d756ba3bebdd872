"""Long documents in blocks of one length, for methods that read a text segment by segment."""

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any, ClassVar

import torch
from torch.nn.utils.rnn import pad_sequence

from kvc.core import seeds
from kvc.core.datamodule import KvcDataModule, Split, check_split
from kvc.core.files import digest
from kvc.data.blocks import PAD_LABEL, Block, Joined, PackedTexts, Part, TokenRows
from kvc.data.corpus import Corpus, load_corpus
from kvc.data.synthetic.blocks import DocumentBlocks, ShortDocumentBlocks
from kvc.errors import UserError

SYNTHETIC = "synthetic:documents"
SHORT = "synthetic:short_documents"
SPLITS: tuple[Split, ...] = ("train", "val", "test")
GENERATOR_VERSION = 2
LESSONS = (8, 4, 2, 1)
"""How many short documents a row of each lesson holds, in half a block: vectors stand for less text there, so a step
costs as much as one of whole blocks."""
SHORTEST = 32
"""Tokens of a short document that tells and reminds of something."""
LESSON_ROWS = 64
"""Rows of training of which a lesson has a multiple, so that all ranks go on to the next in the same step."""


class Documents(KvcDataModule):
    """Blocks of tokens from text, JSONL, the Hub, a set that is tokenised already, or the synthetic generator.

    Texts are tokenised without special tokens, put one after the other and cut; the rest at the end is dropped. A
    source without splits is cut in its own order, and so is the train split of a source that lacks one of the others.

    Batch: `id` `[B]`; `input_ids`, `attention_mask` and `labels` `[B, T]`, T = `block_size`, padded on the right with
    labels -100. Synthetic documents add `answer` bool `[B, T]`, tokens that earlier facts tell, and `fact` bool
    `[B, T]`, the last token of each fact; batches of lessons also `halves`, True `[B]`.

    Args:
        path: `synthetic:documents`, `synthetic:short_documents`, a text or JSONL file, a folder of them, a folder saved
            by `datasets`, or `hub:owner/name[:config]`; with a column `input_ids` it is taken as it is. Several of them
            are joined.
        block_size: Tokens of a block.
        text_key: Key or column of the text.
        separate: Put the EOS token between documents.
        split: Shares of blocks for train, val and test, where the source has none of its own.
        limits: Use at most so many blocks of train, val and test of each source; 0 uses all.
        counts: Numbers of synthetic documents for train, val and test.
        closing: Tokens, at least, of the last section of a synthetic document, which reminds of early facts; null: a
            quarter of the block.
        lessons: Share of the synthetic training rows, from the first on, that hold short documents, which grow: of a
            sixteenth, an eighth, a quarter and half a block, as far as that is 32 tokens. Batches of them have the key
            `halves`: one half tells, the other reminds.
        other_targets: In lessons, share of the tokens that no earlier fact tells which are targets. These are nine
            tokens in ten, and drown the rest as long as the rest is not learned.
        data_seed: Seed of the synthetic documents.
        batch_size: Blocks of a training batch on each rank.
        eval_batch_size: Blocks of an evaluation batch.
        num_workers: Loader processes.
        seed: Seed of the order.
    """

    gives: ClassVar[tuple[str, ...]] = ("id", "input_ids", "attention_mask", "labels")

    def __init__(
        self,
        path: str | list[str] = SYNTHETIC,
        block_size: int = 512,
        text_key: str = "text",
        separate: bool = False,
        split: tuple[float, float, float] = (0.8, 0.1, 0.1),
        limits: tuple[int, int, int] = (0, 0, 0),
        counts: tuple[int, int, int] = (4000, 100, 300),
        closing: int | None = None,
        lessons: float = 0.0,
        other_targets: float = 1.0,
        data_seed: int = seeds.DEFAULT_SEED,
        batch_size: int = 8,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int = seeds.DEFAULT_SEED,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, num_workers, shuffle=True, seed=seed)
        if block_size < 2:
            raise UserError(f"data.block_size must be at least 2 tokens, got {block_size}")
        check_split(split)
        for name, numbers in (("limits", limits), ("counts", counts)):
            if min(numbers) < 0:
                raise UserError(f"data.{name} must not be negative, got {list(numbers)}")
        if closing is not None and not 0 <= closing < block_size:
            raise UserError(f"data.closing must be smaller than data.block_size ({block_size}), got {closing}")
        self.paths = [path] if isinstance(path, str) else list(path)
        made = {SYNTHETIC, SHORT} & set(self.paths)
        if not self.paths or (made and len(self.paths) > 1):
            raise UserError(f"data.path: name sources of documents, or {SYNTHETIC} alone, got {self.paths}")
        self.synthetic = bool(made)
        for name, share, neutral in (("lessons", lessons, 0), ("other_targets", other_targets, 1)):
            if not 0 <= share <= 1:
                raise UserError(f"data.{name} must be a share from 0 to 1, got {share}")
            if share != neutral and not self.synthetic:
                raise UserError(f"data.{name}: only synthetic documents know what earlier facts tell")
        if other_targets < 1 and not lessons:
            raise UserError("data.other_targets has no effect without data.lessons")
        if lessons and block_size % (4 * LESSONS[0]):
            raise UserError(f"data.lessons: data.block_size must be a multiple of {4 * LESSONS[0]}, got {block_size}")
        self.lessons, self.other_targets = lessons, other_targets
        self.path = ", ".join(self.paths)
        self.block_size, self.text_key, self.separate = block_size, text_key, separate
        self.split, self.data_seed, self.counts = split, data_seed, counts
        self.limits = dict(zip(SPLITS, limits))
        self.closing = block_size // 4 if closing is None else closing
        self._corpora: list[Corpus] | None = None
        self._parts: dict[Split, Any] | None = None

    # ------------------------------------------------------------------ reading

    def setup(self, stage: str) -> None:
        """Cut the texts into tokens of the method's base model."""
        if self._parts is not None:
            return
        module: Any = self.trainer.lightning_module  # type: ignore[union-attr]
        if self.synthetic:
            self._parts = self._generated(module.tokenizer)
        else:
            read = [self._read(module.tokenizer, path, source) for path, source in zip(self.paths, self.corpora)]
            self._parts = {split: Joined([parts[split] for parts in read]) for split in SPLITS}
        for split in SPLITS:
            if self.has_split(split) and not len(self._parts[split]):
                raise UserError(
                    f"data.block_size: {self.path} is too short for a {split} block of {self.block_size} tokens"
                )
        if stage == "fit" and not len(self._parts["train"]):
            raise UserError(f"data.path: {self.path} has nothing to train on")
        size = len(module.tokenizer)
        first = [part[0]["input_ids"].max() for part in self._parts.values() if len(part)]
        for largest in map(int, first):
            if largest >= size:
                raise UserError(
                    f"data.path: {self.path} holds the token {largest}, the base model's tokenizer has {size}: it was "
                    "made with another tokenizer"
                )

    def _generated(self, tokenizer: Any) -> dict[Split, Any]:
        counts = {split: min(n, self.limits[split] or n) for split, n in zip(SPLITS, self.counts)}
        taught = self.lesson_sizes(counts["train"])
        parts: dict[Split, Any] = {}
        for split in SPLITS:
            settings = {"tokenizer": tokenizer, "split": split, "size": self.block_size, "seed": self.data_seed}
            if split == "train":
                counts[split] -= len(taught)
            parts[split] = (
                ShortDocumentBlocks(sizes=[self.block_size] * counts[split], **settings)
                if self.paths == [SHORT]
                else DocumentBlocks(closing=self.closing, count=counts[split], **settings)
            )
            if split == "train" and taught:
                settings |= {"size": self.block_size // 2, "other_targets": self.other_targets}
                parts[split] = Joined([ShortDocumentBlocks(sizes=taught, density=1.0, **settings), parts[split]])
        return parts

    def lesson_sizes(self, rows: int | None = None) -> list[int]:
        """Tokens of the short documents in each row of the lessons.

        Args:
            rows: Rows of the training split; all of them if None.
        """
        rows = min(self.counts[0], self.limits["train"] or self.counts[0]) if rows is None else rows
        sizes = [size for count in LESSONS if (size := self.block_size // 2 // count) >= SHORTEST]
        each = round(rows * self.lessons / max(len(sizes), 1) / LESSON_ROWS) * LESSON_ROWS
        return [size for size in sizes for _ in range(each)][:rows]

    def _read(self, tokenizer: Any, path: str, source: Corpus) -> dict[Split, Any]:
        lacking = [split for split in SPLITS if split not in source.parts]
        parts: dict[Split, Any] = {split: [] for split in SPLITS}
        for split, documents in source.parts.items():
            takers: list[Split] = [split, *(lacking if split == "train" else [])]
            limits = [self.limits[taker] for taker in takers]
            limit = sum(limits) if all(limits) else 0
            blocks: TokenRows | PackedTexts
            if source.tokenised:
                blocks = TokenRows(documents, self.block_size, f"{path} {split}", limit)
            else:
                blocks = PackedTexts(tokenizer, documents, self.block_size, limit, self.separate)
            end = len(blocks)
            for taker in reversed(takers[1:]):
                share = self.split[SPLITS.index(taker)]
                size = max(round(len(blocks) * share), int(share > 0 and end > 1))
                size = min(size, self.limits[taker] or size)
                parts[taker], end = Part(blocks, range(end - size, end)), end - size
            parts[split] = Part(blocks, range(min(end, self.limits[split] or end)))
        return parts

    @property
    def corpora(self) -> list[Corpus]:
        """The sources, opened once."""
        if self._corpora is None:
            self._corpora = [load_corpus(path, self.text_key) for path in self.paths]
        return self._corpora

    def has_split(self, split: Split) -> bool:
        """Whether the split has documents, known before anything is tokenised; `setup` refuses one without a block."""
        if self.synthetic:
            return self.counts[SPLITS.index(split)] > 0
        own = [set(corpus.parts) for corpus in self.corpora]
        return any(split in parts or ("train" in parts and self.split[SPLITS.index(split)]) for parts in own)

    @property
    def parts(self) -> dict[Split, Any]:
        """Blocks of each split; there after `setup`."""
        assert self._parts is not None, "setup comes first"
        return self._parts

    def data_hash(self) -> str:
        """Name of the documents and of how they are cut."""
        if self.synthetic:
            taught = [self.lessons, self.other_targets]
            source: list[Any] = [GENERATOR_VERSION, self.paths, self.data_seed, self.counts, self.closing, taught]
        else:
            source = [[corpus.hash for corpus in self.corpora], self.text_key, self.separate, self.split]
        return digest([*source, self.block_size, self.limits])

    def describe(self) -> dict[str, Any]:
        """Source and sizes."""
        sizes = {split: len(part) for split, part in self.parts.items()}
        return {"source": self.path, "block_size": self.block_size, "splits": sizes}

    # ------------------------------------------------------------------ batches

    def dataset(self, split: Split) -> Any:
        """Blocks of a split."""
        return _Rows(self.parts[split])

    def stages(self) -> Sequence[int]:
        """Each lesson, and the rest."""
        taught = self.lesson_sizes() if self.synthetic else []
        lessons = [len(list(rows)) for _, rows in groupby(taught)]
        return [*lessons, len(self.parts["train"]) - len(taught)]

    def collate(self, split: Split) -> Callable[[list[Any]], Any]:
        """Pads on the right to the block size, so that segments are the same on every rank; takes lessons apart."""
        return self._taught if split == "train" and self.lessons else self._collate

    def _taught(self, items: list[tuple[int, Block]]) -> dict[str, torch.Tensor]:
        sizes = self.lesson_sizes()
        size = max(sizes[index] if index < len(sizes) else self.block_size for index, _ in items)
        if size == self.block_size:
            return self._collate(items)
        batch = {key: value[:, : self.block_size // 2] for key, value in self._collate(items).items() if key != "id"}
        apart = {key: value.reshape(-1, size) for key, value in batch.items()}
        numbers = torch.tensor([index for index, _ in items])
        halves = torch.ones(len(apart["input_ids"]), dtype=torch.bool)
        return {"id": numbers.repeat_interleave(self.block_size // 2 // size), "halves": halves, **apart}

    def _collate(self, items: list[tuple[int, Block]]) -> dict[str, torch.Tensor]:
        blocks = [block for _, block in items]

        def pad(key: str, value: float) -> torch.Tensor:
            rows = pad_sequence([block[key] for block in blocks], batch_first=True, padding_value=value)
            return torch.nn.functional.pad(rows, (0, self.block_size - rows.shape[1]), value=value)

        lengths = torch.tensor([len(block["input_ids"]) for block in blocks])
        batch = {
            "id": torch.tensor([index for index, _ in items]),
            "input_ids": pad("input_ids", 0),
            "attention_mask": (torch.arange(self.block_size) < lengths[:, None]).long(),
            "labels": pad("labels", PAD_LABEL),
        }
        extra = [key for key in blocks[0] if key not in batch]
        return batch | {key: pad(key, False) for key in extra}


class _Rows:
    def __init__(self, part: Any) -> None:
        self.part = part

    def __len__(self) -> int:
        return len(self.part)

    def __getitem__(self, key: tuple[int, int]) -> tuple[int, Block]:
        return key[1], self.part[key[1]]
