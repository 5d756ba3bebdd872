"""How well the last segment of a block is predicted, by what stands before it.

Shapes: B batch, T tokens of the block, n tokens of its last segment.
"""

from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from kvc.core import seeds
from kvc.core.module import Batch, Record
from kvc.methods.autocompressor.compressor import IGNORED, Compressor
from kvc.methods.autocompressor.softprompt import SoftPrompt


class Arm(NamedTuple):
    """What stands before the last segment.

    Attributes:
        before: Segments that are summarised; 0 for none.
        full: The text of all of them instead.
        base: Read by the base model as it was before training.
        soft: Variable length: the weighted vectors of training instead of hard stops.
    """

    before: int
    full: bool = False
    base: bool = False
    soft: bool = False


def arms_of(lengths: list[int], full: bool, compresses: bool, variable: bool) -> dict[str, Arm]:
    """What is measured; the first is the method.

    Args:
        lengths: Of the segments of a block.
        full: The method reads the full text.
        compresses: It makes summaries.
        variable: Of a number that it chooses.
    """
    last = len(lengths) - 1
    method = Arm(last, full=True) if full else Arm(last if compresses else 0)
    arms = {"method": method, "no_context": Arm(0), "full": Arm(last, full=True)}
    if compresses and not full:
        arms |= {f"after_{count}": Arm(count) for count in range(1, last)}
    if variable:
        arms["soft"] = Arm(last, soft=True)
    arms |= {"base_no_context": Arm(0, base=True), "base_full": Arm(last, full=True, base=True)}
    return {name: arm for name, arm in arms.items() if name == "method" or arm != method}


def last_segment(compressor: Compressor, batch: Batch, lengths: list[int], arm: Arm) -> list[Record]:
    """Scores of each row.

    The first token of the segment is left out: what predicts it stands before the segment.

    Args:
        compressor: A model in eval mode.
        batch: `id` `[B]`; `input_ids`, `attention_mask` and `labels` `[B, T]`; perhaps `answer` and `fact`, bool
            `[B, T]`: tokens that are scored apart, and tokens that are counted.
        lengths: Of the segments; they end where the block ends.
        arm: What stands before the last one.

    Returns:
        For each row: `nll` and `right` over `tokens`, `answer_nll` over `answer_tokens`; rows of KV per layer and head
        `kv_tokens_peak` and `kv_tokens_final`; `kv_share`, rows before the last segment by tokens before it;
        `segments`, for each one that was summarised its `tokens`, `vectors` and `facts`.
    """
    ids, mask = batch["input_ids"], batch["attention_mask"]
    tail = lengths[-1]
    used = lengths if arm.full else lengths[len(lengths) - 1 - arm.before :]
    start = ids.shape[1] - sum(used)
    if arm.full:
        hidden = compressor.read(ids[:, start:], mask[:, start:]).hidden[:, -tail:]
        told = mask[:, start : ids.shape[1] - tail].sum(-1)
        before, peak = told, told
        segments: list[list[Record]] = [[] for _ in ids]
    else:
        hidden, before, peak, segments = _compressed(compressor, batch, used, start, arm.soft)
    targets = batch["labels"][:, -tail:][:, 1:]
    chosen = targets != IGNORED
    logits = compressor.logits(hidden[:, :-1][chosen]).float()
    nll = torch.zeros_like(targets, dtype=torch.float32)
    nll[chosen] = F.cross_entropy(logits, targets[chosen], reduction="none")
    right = torch.zeros_like(chosen)
    right[chosen] = logits.argmax(-1) == targets[chosen]
    answer = batch["answer"][:, -tail:][:, 1:] & chosen if "answer" in batch else torch.zeros_like(chosen)
    final = before + mask[:, -tail:].sum(-1)
    context = mask[:, ids.shape[1] - sum(lengths) : ids.shape[1] - tail].sum(-1)
    columns = {
        "nll": nll.sum(-1),
        "right": right.sum(-1),
        "tokens": chosen.sum(-1),
        "answer_nll": (nll * answer).sum(-1),
        "answer_right": (right & answer).sum(-1),
        "answer_tokens": answer.sum(-1),
        "kv_tokens_peak": torch.maximum(peak, final),
        "kv_tokens_final": final,
        "kv_share": before / context.clamp(min=1),
    }
    rows = zip(*(column.tolist() for column in columns.values()))
    return [{**dict(zip(columns, row)), "segments": found} for row, found in zip(rows, segments)]


def _compressed(
    compressor: Compressor, batch: Batch, lengths: list[int], start: int, soft: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[list[Record]]]:
    """Hidden states of the last segment; vectors before it, the most rows on the way, and each segment's vectors."""
    ids, mask = batch["input_ids"], batch["attention_mask"]
    prompt: SoftPrompt | None = None
    before = torch.zeros(len(ids), dtype=torch.int64, device=ids.device)
    peak = before
    segments: list[list[Record]] = [[] for _ in ids]
    accumulate: Any = getattr(compressor.summary, "accumulate", False)
    for index, length in enumerate(lengths):
        part = slice(start, start + length)
        start += length
        last = index == len(lengths) - 1
        reading = compressor.read(
            ids[:, part],
            mask[:, part],
            softprompt=prompt,
            output_softprompt=not last,
            soft=soft,
            # The same draws whichever rows share a batch.
            generator=[seeds.generator(number, index) for number in batch["id"].tolist()],
        )
        if last:
            break
        prompt = reading.prompt
        tokens, after = mask[:, part].sum(-1), prompt.lengths
        made = after - before if accumulate else after * (tokens > 0)
        peak = torch.maximum(peak, before + tokens + made)
        facts = batch["fact"][:, part].sum(-1) if "fact" in batch else torch.zeros_like(made)
        columns = {"tokens": tokens.tolist(), "vectors": made.tolist(), "facts": facts.tolist()}
        for row, found in enumerate(segments):
            found.append({name: column[row] for name, column in columns.items()})
        before = after
    return reading.hidden, before, peak, segments
