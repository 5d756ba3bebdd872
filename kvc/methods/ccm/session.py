"""A conversation or document that is read chunk by chunk, asked at any time, put away and taken up again.

    >>> from kvc.core.backbone import Backbone, Lora
    >>> from kvc.methods.ccm import CompressedContextMemory
    >>> method = CompressedContextMemory(Backbone(lora=Lora()), slots=2).eval()  # or kvc.load(folder)
    >>> session = Session.of(method)
    >>> session.compress(["Tom has 3 apples and eats one. ", "Ann has 5 pears. "])
    >>> session.compress(["He buys 4 more. ", ""])
    >>> session.tokens.tolist()
    [4, 2]
    >>> answer = session.generate(["How many apples? ", "How many pears? "], max_new_tokens=5, eos_token_id=())
    >>> [len(tokens) for tokens in answer.tokens]
    [5, 5]
    >>> session.tokens.tolist()
    [4, 2]

Shapes: B rows of the batch, T tokens, V vocabulary, n slots.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from transformers import PreTrainedTokenizerBase

from kvc.cache.store import load_memory, read_metadata, save_memory
from kvc.core.attention import check_window
from kvc.errors import UserError
from kvc.generation.decode import generate
from kvc.generation.output import Output
from kvc.methods.ccm.identity import check, identity
from kvc.methods.ccm.parallel import Compressor
from kvc.methods.ccm.recurrent import CompressedMemory, reader

if TYPE_CHECKING:
    from kvc.methods.ccm.module import CompressedContextMemory

FILE = "memory.safetensors"
KEY = "ccm_session"
Texts = Sequence[str | Sequence[int]]
"""One text, or the ids of its tokens, for each row of the batch."""


class Session:
    """Compressed memories of a batch of texts.

    What is held of a chunk are the keys and values of its n memory tokens: n more rows for each chunk (`concat`,
    `concat_recur`), or n rows in all (`merge`, `merge_recur`). Positions are those of training.

    A text is read without special tokens; the first one of a row begins with the BOS token, if the tokenizer has one.

    Args:
        compressor: Model in eval mode, memory tokens and kind.
        tokenizer: Reads and writes texts; None if there are only ids.
        sink: The first token of each row is kept as it is.

    Raises:
        UserError: If the kind cannot compress chunk by chunk.
    """

    def __init__(
        self, compressor: Compressor, tokenizer: PreTrainedTokenizerBase | None = None, sink: bool = False
    ) -> None:
        self.compressor, self.tokenizer, self.sink = compressor, tokenizer, sink
        self._held = CompressedMemory(compressor)

    @classmethod
    def of(cls, method: "CompressedContextMemory") -> Self:
        """A session of a trained method, with its tokenizer and sink."""
        return cls(method.compressor, method.tokenizer, method.sink)

    # ------------------------------------------------------------------ what is held

    @property
    def tokens(self) -> torch.Tensor:
        """Rows of KV that each text takes in each layer and head, int64 `[B]`; `[1]` before the first one."""
        return self._held.memory.tokens.round().long() if self._started else self._held.steps

    @property
    def bytes(self) -> int:
        """Bytes that are held for the whole batch, positions included."""
        return self._held.bytes

    @property
    def peak(self) -> torch.Tensor:
        """Most rows that each text took while a chunk was read, int64 `[B]`."""
        return self._held.peak

    @property
    def steps(self) -> torch.Tensor:
        """Chunks compressed so far, int64 `[B]`; `[1]` before the first one."""
        return self._held.steps

    @property
    def next_position(self) -> torch.Tensor:
        """Position of the next token, int64 `[B]`; `[1]` before the first one."""
        return self._held.memory.next_position if self._started else self._held.steps

    @property
    def _started(self) -> bool:
        return bool(self._held.memory.layers[0].is_initialized)

    # ------------------------------------------------------------------ reading

    @torch.no_grad()
    def keep(self, texts: Texts) -> None:
        """Read texts that stay in the memory token by token: a prompt, an instruction.

        Args:
            texts: One for each row; an empty one adds nothing.

        Raises:
            UserError: If a chunk was compressed before, the session has a sink, or the texts do not fit.
        """
        if self.sink:
            raise UserError("sink: has no effect with texts that are kept, which include the first token")
        if int(self.steps.max()):
            raise UserError("texts: those to keep come before the first chunk that is compressed")
        rows = self._read(texts, "texts")
        if any(rows):
            self._held.keep(*self._padded(rows))

    @torch.no_grad()
    def compress(self, chunks: Texts) -> None:
        """Read the next chunk of each text, and hold its memory tokens instead of it.

        Args:
            chunks: One for each row; a row with an empty one stays as it is. A session that holds one row goes on with
                as many as are given.

        Raises:
            UserError: If the chunks do not fit.
        """
        rows = self._read(chunks, "chunks", self.compressor.tokens.slots)
        if self.sink and not self._started:
            short = next((index for index, row in enumerate(rows) if len(row) < 2), None)
            if short is not None:
                raise UserError(
                    f"chunks: row {short} needs a token beside the sink in its first chunk, it has {len(rows[short])}"
                )
            self._held.keep(*self._padded([row[:1] for row in rows]))
            rows = [row[1:] for row in rows]
        if any(rows):
            self._held.compress(*self._padded(rows))

    @torch.no_grad()
    def logits(self, queries: Texts) -> list[torch.Tensor]:
        """Logits `[T, V]` of every token of each query; the memory stays as it is.

        Args:
            queries: One for each row; any number if the session holds one row.

        Raises:
            UserError: If the queries do not fit.
        """
        rows = self._read(queries, "queries")
        if not any(rows):
            raise UserError("queries: all of them are empty")
        logits = self._held.logits(*self._padded(rows))
        return [line[len(line) - len(row) :] for line, row in zip(logits, rows)]

    def generate(self, queries: Texts, *, max_new_tokens: int, **options: Any) -> Output:
        """Answer a query of each text; the memory stays as it is.

        Args:
            queries: One for each row, none empty; any number if the session holds one row.
            max_new_tokens: Limit of each answer.
            **options: Further settings of `kvc.generation.decode.generate`: sampler, stop strings, eviction ...

        Returns:
            Answers, and what the memory took while they were decoded.

        Raises:
            UserError: If the queries or settings do not fit.
        """
        if "memory" in options:
            raise UserError("memory: a session generates from its own memory")
        ids, mask = self._padded(self._read(queries, "queries", max_new_tokens))
        memory = self._held.memory.fork()
        with reader(self.compressor) as model:
            settings = {"tokenizer": self.tokenizer, **options}
            return generate(model, ids, mask, max_new_tokens=max_new_tokens, memory=memory, **settings)

    def _read(self, texts: Texts, name: str, more: int = 0) -> list[list[int]]:
        """Ids of each row, checked; `more` tokens will follow them.

        Raises:
            UserError: If they do not fit the session or the model.
        """
        if self.compressor.model.training:
            raise UserError("model: a session in train mode would drop activations at random, call model.eval() first")
        if isinstance(texts, str) or not len(texts):
            raise UserError(f"{name}: give a list with one text for each row of the batch")
        held = len(self.next_position)
        if held not in (1, len(texts)):
            raise UserError(f"{name}: {len(texts)} rows do not fit a session that holds {held}")
        starts = self.next_position.expand(len(texts)).tolist()
        rows = [self._ids(text, start == 0, name) for text, start in zip(texts, starts)]
        largest = max((max(row) for row in rows if row), default=0)
        if largest >= self.compressor.tokens.vocabulary:
            raise UserError(f"{name}: the base model has no token {largest}, memory tokens are put in by the session")
        check_window(self.compressor.model, max(start + len(row) for start, row in zip(starts, rows)) + more)
        return rows

    def _ids(self, text: str | Sequence[int], first: bool, name: str) -> list[int]:
        if not isinstance(text, str):
            return list(text)
        if self.tokenizer is None:
            raise UserError(f"{name}: a session without a tokenizer takes ids of tokens, not text")
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        bos: Any = self.tokenizer.bos_token_id
        return [bos, *ids] if first and ids and bos is not None and ids[0] != bos else ids

    def _padded(self, rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and mask `[B, T]`, padded on the left, as decoding needs it."""
        width, device = max(map(len, rows)), self.compressor.model.device
        ids = torch.tensor([[0] * (width - len(row)) + row for row in rows], dtype=torch.int64, device=device)
        start = torch.tensor([[width - len(row)] for row in rows], device=device)
        return ids, (torch.arange(width, device=device) >= start).long()

    # ------------------------------------------------------------------ files

    def save(self, folder: str | Path) -> None:
        """Write the session as one file, `FILE`, in a folder; a session there is replaced.

        Args:
            folder: New or not.

        Raises:
            UserError: If nothing was read yet, or the file cannot be written.
        """
        state = {
            **identity(self.compressor),
            "sink": self.sink,
            "steps": self.steps.expand(len(self.next_position)).tolist(),
            "peak": self.peak.expand(len(self.next_position)).tolist(),
        }
        save_memory(self._held.memory, Path(folder) / FILE, self.compressor.model, {KEY: state})

    @classmethod
    def load(cls, folder: str | Path, compressor: Compressor, tokenizer: PreTrainedTokenizerBase | None = None) -> Self:
        """Take a session up again.

        Args:
            folder: Where it was saved.
            compressor: The same model, adapter, memory tokens and settings that it was saved with.
            tokenizer: Reads and writes texts; None if there are only ids.

        Raises:
            UserError: If the file is missing or damaged, or the session one of another model, adapter, kind, number
                of memory tokens or rule.
        """
        path = Path(folder) / FILE
        state = read_metadata(path)["user"].get(KEY)
        if state is None:
            raise UserError(f"{path}: a memory, but not one of a CCM session")
        check(path, state, compressor)
        session = cls(compressor, tokenizer, state["sink"])
        memory = load_memory(path, compressor.model)
        steps, peak = (torch.tensor(state[name], device=compressor.model.device) for name in ("steps", "peak"))
        session._held.restore(memory, steps, peak)
        return session
