"""Blocks of tokens of one length: cut from a stream of texts, or rows that are tokenised already."""

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import accumulate, islice
from typing import Any, Protocol

import torch

from kvc.data.corpus import TOKENS
from kvc.errors import UserError

PAD_LABEL = -100
Block = dict[str, torch.Tensor]
"""`input_ids` and `labels` `[T]`, T at most the block's size; padding is not in it."""


class Blocks(Protocol):
    """Blocks in the order of their source."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Block: ...


class PackedTexts:
    """Texts one after the other, cut into blocks; what is left over at the end is dropped.

    Args:
        tokenizer: Adds no special tokens.
        texts: The documents.
        size: Tokens of a block.
        limit: Read no further than so many blocks need; 0 reads all.
        separate: Put the EOS token between documents.
    """

    batch = 256
    """Texts that are tokenised together."""

    def __init__(self, tokenizer: Any, texts: Iterable[str], size: int, limit: int = 0, separate: bool = False) -> None:
        parts, total = [torch.zeros(0, dtype=torch.int32)], 0
        end = [tokenizer.eos_token_id] if separate else []
        stream = iter(texts)
        while (chunk := list(islice(stream, self.batch))) and not (limit and total >= limit * size):
            rows = tokenizer(chunk, add_special_tokens=False, return_attention_mask=False, verbose=False)[TOKENS]
            parts.append(torch.tensor([token for row in rows for token in [*row, *end]], dtype=torch.int32))
            total += len(parts[-1])
        count = min(total // size, limit or total)
        self.rows = torch.cat(parts)[: count * size].view(count, size)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Block:
        ids = self.rows[index].long()
        return {"input_ids": ids, "labels": ids}


class TokenRows:
    """Rows with `input_ids` and perhaps `attention_mask` and `labels`; a longer row keeps its end.

    Args:
        rows: Read one by one, so that a set on disk stays there.
        size: Longest block.
        where: Names the rows in errors.
        limit: Use no more rows; 0 uses all.
    """

    def __init__(self, rows: Sequence[Any], size: int, where: str, limit: int = 0) -> None:
        self.rows, self.size, self.where = rows, size, where
        self.count = min(len(rows), limit or len(rows))

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Block:
        row = self.rows[index]
        try:
            ids = torch.as_tensor(row[TOKENS]).long()
            real = torch.as_tensor(row.get("attention_mask", torch.ones_like(ids))).bool()
            labels = torch.as_tensor(row.get("labels", ids)).long()
            block = {"input_ids": ids[real][-self.size :], "labels": labels[real][-self.size :]}
        except (TypeError, ValueError, RuntimeError, IndexError):
            raise UserError(
                f"data.path: {self.where} row {index}: {TOKENS}, attention_mask and labels must be lists of integers "
                "of one length"
            ) from None
        if not len(block[TOKENS]):
            raise UserError(f"data.path: {self.where} row {index} holds no token")
        return block


class Part:
    """A range of blocks.

    Args:
        blocks: All of them.
        places: Those that belong to it.
    """

    def __init__(self, blocks: Blocks, places: range) -> None:
        self.blocks, self.places = blocks, places

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Block:
        return self.blocks[self.places[index]]


class Joined:
    """Blocks of several sources, one source after the other.

    Args:
        parts: Of each source.
    """

    def __init__(self, parts: Sequence[Blocks]) -> None:
        self.parts = parts
        self.ends = list(accumulate(len(part) for part in parts))

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int) -> Block:
        which = bisect_right(self.ends, index)
        return self.parts[which][index - (self.ends[which] - len(self.parts[which]))]
