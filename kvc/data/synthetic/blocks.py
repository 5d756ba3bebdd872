"""Synthetic documents as blocks of one length whose end can be predicted only from facts told long before."""

from typing import Any

import torch

from kvc.data.synthetic.base import rng_for
from kvc.data.synthetic.documents import SECTION, sample_document, tells_fact
from kvc.data.synthetic.example import plain
from kvc.data.tokens import tokenize
from kvc.errors import UserError


class DocumentBlocks:
    """One document a block: facts, filler and reminders, and a closing section that reminds of early facts.

    Each block has, beside `input_ids` and `labels` `[T]`: `answer` bool `[T]`, tokens that earlier facts tell, and
    `fact` bool `[T]`, the last token of each sentence that tells a fact.

    Args:
        tokenizer: Tokens are counted as the tiny model's tokenizer counts them; with another one the closing section
            is longer or shorter.
        split: The splits share no document.
        count: Number of documents.
        size: Tokens of a block.
        closing: Tokens of the closing section, at least.
        seed: Seed of all documents.
    """

    def __init__(self, tokenizer: Any, split: str, count: int, size: int, closing: int, seed: int) -> None:
        if size - closing < 2 * SECTION + 50:
            raise UserError(
                f"data.block_size: a synthetic document needs {2 * SECTION + 50} tokens before its closing section of "
                f"{closing}, {size} are too few"
            )
        self.tokenizer, self.split, self.count, self.size, self.closing, self.seed = (
            tokenizer,
            split,
            count,
            size,
            closing,
            seed,
        )

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        body = self.size - self.closing
        rng = rng_for("document-blocks", self.split, self.seed, index)
        # The body may be shorter than asked for by up to two sections; the closing section fills the block.
        document = plain(sample_document(rng, (body, body), self.closing + 2 * SECTION))
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
        keep = slice(0, self.size)
        return {"input_ids": ids[keep], "labels": ids[keep], "answer": answer[keep], "fact": told[keep]}
