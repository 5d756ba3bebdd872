"""Synthetic documents as blocks of one length whose end can be predicted only from facts told long before."""

import random
from abc import ABC, abstractmethod
from typing import Any

import torch

from kvc.data.blocks import PAD_LABEL
from kvc.data.synthetic.base import Document, rng_for
from kvc.data.synthetic.documents import SECTION, sample_document, tells_fact
from kvc.data.synthetic.example import plain
from kvc.data.synthetic.short_documents import sample_short_document
from kvc.data.tokens import tokenize
from kvc.errors import UserError


class SyntheticBlocks(ABC):
    """One document a block.

    Each block has `input_ids` and `labels` `[T]`; `answer` bool `[T]`, tokens that earlier facts tell; and `fact` bool
    `[T]`, the last token of each sentence that tells a fact.

    Args:
        tokenizer: Tokens are counted as the tiny model's tokenizer counts them; with another one the end of a document
            is longer or shorter.
        split: The splits share no document.
        count: Number of documents.
        size: Tokens of a block.
        seed: Seed of all documents.
        other_targets: Share of the tokens that no earlier fact tells which are targets; the others have labels -100.
    """

    name: str

    def __init__(
        self, tokenizer: Any, split: str, count: int, size: int, seed: int, other_targets: float = 1.0
    ) -> None:
        self.tokenizer, self.split, self.count, self.size, self.seed = tokenizer, split, count, size, seed
        self.other_targets = other_targets

    def __len__(self) -> int:
        return self.count

    @abstractmethod
    def document(self, index: int, rng: random.Random) -> list[Document]:
        """The documents of a block, which fill it, and of which each begins with BOS; the last one may be cut."""

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        rng = rng_for(self.name, self.split, self.seed, index)
        documents = self.document(index, rng)
        size = self.size // len(documents)
        parts = [self._encoded(document, size) for document in documents]
        block = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
        block["labels"] = block["input_ids"]
        if self.other_targets < 1:
            drawn = torch.tensor([rng.random() < self.other_targets for _ in range(len(block["labels"]))])
            block["labels"] = block["labels"].masked_fill(~(block["answer"] | drawn), PAD_LABEL)
        return block

    def _encoded(self, document: Document, size: int) -> dict[str, torch.Tensor]:
        tokens = tokenize(self.tokenizer, document)
        ends = torch.tensor(tokens.ends)
        told = torch.zeros(len(ends), dtype=torch.bool)
        written = 0
        for segment in document:
            written += len(segment.text)
            if tells_fact(segment):
                told[int(torch.searchsorted(ends, written))] = True
        answer = torch.tensor([kind == "answer" for kind in tokens.kinds])
        ids = torch.tensor(tokens.ids)
        if self.tokenizer.bos_token_id is not None:
            start = torch.tensor([self.tokenizer.bos_token_id])
            ids, blank = torch.cat([start, ids]), torch.zeros(1, dtype=torch.bool)
            told, answer = torch.cat([blank, told]), torch.cat([blank, answer])
        return {"input_ids": ids[:size], "answer": answer[:size], "fact": told[:size]}


class DocumentBlocks(SyntheticBlocks):
    """Long documents: facts, filler and reminders, and a closing section that reminds of early facts.

    Args:
        closing: Tokens of the closing section, at least.
        **settings: See `SyntheticBlocks`.
    """

    name = "document-blocks"

    def __init__(self, *, closing: int, **settings: Any) -> None:
        super().__init__(**settings)
        if self.size - closing < 2 * SECTION + 50:
            raise UserError(
                f"data.block_size: a synthetic document needs {2 * SECTION + 50} tokens before its closing section of "
                f"{closing}, {self.size} are too few"
            )
        self.closing = closing

    def document(self, index: int, rng: random.Random) -> list[Document]:
        """See `SyntheticBlocks`."""
        body = self.size - self.closing
        # The body may be shorter than asked for by up to two sections; the closing section fills the block.
        return [plain(sample_document(rng, (body, body), self.closing + 2 * SECTION))]


class ShortDocumentBlocks(SyntheticBlocks):
    """Short documents; a block of more tokens than a document has holds several.

    Args:
        sizes: Tokens of the documents of a block, for each block.
        density: Share of their sentences that tell facts; None draws it for each document.
        **settings: See `SyntheticBlocks`.
    """

    name = "short-document-blocks"

    def __init__(self, *, sizes: list[int], density: float | None = None, **settings: Any) -> None:
        super().__init__(count=len(sizes), **settings)
        self.sizes, self.density = sizes, density

    def document(self, index: int, rng: random.Random) -> list[Document]:
        """See `SyntheticBlocks`."""
        size = self.sizes[index]
        return [sample_short_document(rng, size, self.density) for _ in range(self.size // size)]
