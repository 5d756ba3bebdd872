"""What a compressor stands beside: the frozen model with all of the text, without it, and with as many tokens of it.

Shapes: B batch, S context tokens.
"""

import json
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from kvc.core import seeds
from kvc.core.module import Record
from kvc.data.squad.ratios import keep_tokens
from kvc.errors import UserError
from kvc.methods.squad.answers import answer, end_tokens, now
from kvc.methods.squad.budget import Budget, FixedRatio, FixedSlots
from kvc.methods.squad.mean_pool import MeanPool
from kvc.methods.squad.readers import SlotReader, TextReader
from kvc.methods.squad.reading import Reading, Tokens
from kvc.methods.squad.records import graded
from kvc.methods.squad.source import EMBEDDINGS, Source

METHOD = "method"
PLAIN = ("full", "no_context")
SIZED = ("first", "last", "random", "mean_pool")
"""As many tokens of the text as the compressor makes slots; and means of embeddings, untrained."""
CONTROLS = {"full_text": "full_tuned", "no_context": "no_context_tuned"}
"""Arms that trained controls become, by their mode."""


def label(budget: Budget) -> str:
    """A short name of a budget: `M64`, `r4`."""
    if isinstance(budget, FixedSlots):
        return f"M{budget.slots}" + ("" if budget.policy == "exact" else f"-{budget.policy}")
    return f"r{budget.ratio:g}" if isinstance(budget, FixedRatio) else str(budget)


def slot_counts(budget: Budget, lengths: torch.Tensor, max_length: int | None) -> torch.Tensor:
    """Slots of texts that are compressed in pieces of `max_length`, int64 `[B]`, from their tokens `[B]`."""
    if max_length is None:
        return budget.counts(lengths)
    pieces = -(-max(1, int(lengths.max())) // max_length)
    start = torch.arange(pieces, device=lengths.device) * max_length
    parts = (lengths[:, None] - start).clamp(0, max_length)
    return budget.counts(parts.flatten()).view_as(parts).sum(1)


def bare(batch: dict[str, Any], tokenizer: Any) -> Tokens:
    """The prompts without their contexts, with BOS, padded on the left."""
    rows = []
    for question in batch["questions"]:
        ids = tokenizer(question.bare_prompt, add_special_tokens=False)["input_ids"]
        bos = tokenizer.bos_token_id
        rows.append(ids if bos is None or ids[:1] == [bos] else [bos, *ids])
    longest = max(map(len, rows))
    device = batch["head_ids"].device
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[False] * (longest - len(row)) + [True] * len(row) for row in rows], device=device)
    return Tokens(ids, mask)


def nothing(tokens: Tokens) -> Tokens:
    """No tokens, for as many rows."""
    return Tokens(tokens.ids[:, :0], tokens.mask[:, :0])


class Arms:
    """Answers of a model that was not trained to read slots.

    Args:
        tokenizer: Its tokenizer.
        max_length: Tokens of the pieces in which the compressor reads; None if it reads texts whole.
        max_new_tokens: Limit of each answer.
        seed: Seed of random tokens, drawn anew for each question.
    """

    def __init__(self, tokenizer: Any, max_length: int | None, max_new_tokens: int, seed: int) -> None:
        self.tokenizer, self.max_length, self.max_new_tokens, self.seed = tokenizer, max_length, max_new_tokens, seed

    def counts(self, arm: str, budget: Budget, lengths: torch.Tensor) -> torch.Tensor:
        """Rows that stand for each context in an arm of `SIZED`, int64 `[B]`, from the tokens of the contexts."""
        counts = slot_counts(budget, lengths, self.max_length)
        # A text cannot be cut to more tokens than it has.
        return counts if arm == "mean_pool" else torch.minimum(counts, lengths)

    def records(
        self, model: PreTrainedModel, batch: dict[str, Any], arm: str, budget: Budget | None, row_bytes: float
    ) -> list[Record]:
        """Answer a batch.

        Args:
            model: In eval mode, with the adapters on or off that are wanted.
            batch: See `kvc.data.squad.Squad`.
            arm: One of `PLAIN`, or with a budget one of `SIZED`.
            budget: How many tokens are left.
            row_bytes: See `graded`.
        """
        start = now(model.device)
        reading, tail = self.read(model, batch, arm, budget)
        seconds = now(model.device) - start
        said = answer(model, reading, tail, self.max_new_tokens, end_tokens(model, self.tokenizer))
        return graded(batch["questions"], self.tokenizer, said, reading, tail, seconds, row_bytes)

    @torch.no_grad()
    def read(
        self, model: PreTrainedModel, batch: dict[str, Any], arm: str, budget: Budget | None
    ) -> tuple[Reading, Tokens]:
        """What stands before the answer: head and context, then the tail."""
        head, context, tail = (Tokens.of(batch, part) for part in ("head", "context", "tail"))
        if arm == "no_context":
            return TextReader().read(model, bare(batch, self.tokenizer), nothing(context)), nothing(tail)
        if budget is None:
            return TextReader().read(model, head, context), tail
        if arm == "mean_pool":
            width = int(model.get_input_embeddings().weight.shape[1])
            pool = MeanPool(width, 1.0, project=False, norm=False)
            size = self.max_length or context.ids.shape[1]
            return SlotReader(Source(EMBEDDINGS), pool, size).read(model, head, context, budget), tail
        context = context.right()
        kept = context.mask & self._kept(batch["id"].tolist(), context, arm, budget)
        return TextReader().read(model, head, Tokens(context.ids, kept)), tail

    def _kept(self, ids: Sequence[int], context: Tokens, arm: str, budget: Budget) -> torch.Tensor:
        counts = self.counts(arm, budget, context.lengths).tolist()
        kept = torch.zeros_like(context.mask)
        for row, (number, count, length) in enumerate(zip(ids, counts, context.lengths.tolist())):
            generator = seeds.generator(self.seed, number)
            places = keep_tokens(range(length), count, arm, generator)  # type: ignore[arg-type]
            kept[row, torch.tensor(places, dtype=torch.int64, device=kept.device)] = True
        return kept


class Stored:
    """Arms that were measured before, by the number of the question.

    Args:
        folders: Run folders: of `TextBaselines`, and of controls (`mode: full_text` or `no_context`).
    """

    def __init__(self, folders: Sequence[str]) -> None:
        self.folders = [Path(folder).expanduser() for folder in folders]
        self.arms: dict[str, dict[int, Record]] = {}

    def check(self) -> None:
        """Refuse folders that are none.

        Raises:
            UserError: If a folder holds no finished run.
        """
        for folder in self.folders:
            if not (folder / "result.json").is_file():
                raise UserError(f"model.baselines: {folder} holds no result.json, so it is no finished run")

    def load(self, split: str, data: str, base: str, max_new_tokens: int) -> None:
        """Read what belongs to these questions and this base model; other folders are left out with a warning.

        Args:
            split: Split of the questions.
            data: Hash of the data.
            base: Hash of the base model.
            max_new_tokens: Limit of each answer.
        """
        self.arms = {}
        wanted = {"split": split, "data": data, "base model": base, "max_new_tokens": max_new_tokens}
        for folder in self.folders:
            place = folder if (folder / "predictions.jsonl").is_file() else folder / "eval" / split
            try:
                result = json.loads((place / "result.json").read_text(encoding="utf-8"))
                with (place / "predictions.jsonl").open(encoding="utf-8") as lines:
                    records = [json.loads(line) for line in lines]
                settings = result["config"]["model"].get("init_args", {})
                found = {
                    "split": result["split"],
                    "data": result["data"]["hash"],
                    "base model": result["base_model"]["hash"],
                    "max_new_tokens": settings.get("max_new_tokens", max_new_tokens),
                }
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                warnings.warn(f"model.baselines: {place} cannot be read ({error}): left out", stacklevel=2)
                continue
            if other := [key for key, value in wanted.items() if found[key] != value]:
                warnings.warn(f"model.baselines: {place} has another {other[0]}: left out", stacklevel=2)
                continue
            for name, arm in _arms_of(records, settings.get("mode")):
                self.arms[name] = arm

    def of(self, arm: str, number: int) -> Record | None:
        """The record of an arm, if there is one."""
        return self.arms.get(arm, {}).get(number)


def _arms_of(records: Sequence[Record], mode: str | None) -> Iterator[tuple[str, dict[int, Record]]]:
    """Arms of the records: what stands under `arms`, and a control's own answers."""
    for name in records[0]["arms"] if records else ():
        if name != METHOD:
            yield name, {record["id"]: record["arms"][name] for record in records}
        elif mode in CONTROLS:
            yield CONTROLS[mode], {record["id"]: record["arms"][name] for record in records}
