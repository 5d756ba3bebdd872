"""In-context learning with compressed demonstrations: the option of least mean negative log-likelihood is the answer.

Shapes: B batch, T tokens of the demonstrations, O options, Q tokens of query and option.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch.nn import functional as F

from kvc.core import seeds
from kvc.core.module import Batch, Record
from kvc.core.results import Summary, bootstrap_mean, bootstrap_weights, interval
from kvc.methods.autocompressor.compressor import Compressor
from kvc.methods.autocompressor.evaluation import Arm
from kvc.methods.autocompressor.scoring import METHOD, mean
from kvc.methods.autocompressor.softprompt import SoftPrompt


def choice_arms(full: bool, compresses: bool) -> dict[str, Arm]:
    """What is measured; the first is the method.

    Args:
        full: The method reads the full text.
        compresses: It makes summaries.
    """
    method = Arm(int(full or compresses), full=full)
    arms = {
        METHOD: method,
        "no_context": Arm(0),
        "full": Arm(1, full=True),
        "base_no_context": Arm(0, base=True),
        "base_full": Arm(1, full=True, base=True),
    }
    return {name: arm for name, arm in arms.items() if name == METHOD or arm != method}


def choose(compressor: Compressor, batch: Batch, lengths: list[int], arm: Arm) -> list[Record]:
    """The chosen option of each row.

    Args:
        compressor: A model in eval mode.
        batch: `id` `[B]`; `input_ids` and `attention_mask` `[B, T]` of the demonstrations; `option_ids`, `option_mask`
            and `option_answer` `[B, O, Q]`; `gold` `[B]`.
        lengths: Of the segments in which demonstrations are summarised; they sum to T.
        arm: What stands before the query.

    Returns:
        For each row: `chosen`, `correct`, and rows of KV per layer and head before the query, `kv_tokens_context`,
        also as a share of the demonstrations' tokens, `kv_share`.
    """
    ids, mask = batch["input_ids"], batch["attention_mask"]
    asked, shown, answer = (batch[f"option_{name}"].flatten(0, 1) for name in ("ids", "mask", "answer"))
    options = batch["option_ids"].shape[1]
    prompt: SoftPrompt | None = None
    told = mask.sum(-1)
    held = torch.zeros_like(told)
    if arm.full:
        before = ids.repeat_interleave(options, 0), mask.repeat_interleave(options, 0)
        hidden = compressor.read(torch.cat([before[0], asked], 1), torch.cat([before[1], shown], 1)).hidden
        hidden, held = hidden[:, ids.shape[1] :], told
    else:
        if arm.before:
            # The same draws whichever rows share a batch.
            draws = [seeds.generator(number) for number in batch["id"].tolist()]
            reading = compressor.read(ids, mask, segment_lengths=lengths, output_softprompt=True, generator=draws)
            prompt, held = _repeated(reading.prompt, options), reading.prompt.lengths
        hidden = compressor.read(asked, shown, softprompt=prompt).hidden
    chosen = answer[:, 1:]
    logits = compressor.logits(hidden[:, :-1][chosen]).float()
    nll = torch.zeros_like(chosen, dtype=torch.float32)
    nll[chosen] = F.cross_entropy(logits, asked[:, 1:][chosen], reduction="none")
    count = chosen.sum(-1)
    per_token = (nll.sum(-1) / count.clamp(min=1)).masked_fill(count == 0, torch.inf).view(-1, options)
    best = per_token.argmin(-1)
    columns = {
        "chosen": best.tolist(),
        "correct": (best == batch["gold"]).tolist(),
        "kv_tokens_context": held.tolist(),
        "kv_share": (held / told.clamp(min=1)).tolist(),
    }
    return [dict(zip(columns, row)) for row in zip(*columns.values())]


def _repeated(prompt: SoftPrompt, times: int) -> SoftPrompt:
    return replace(
        prompt,
        vectors=prompt.vectors.repeat_interleave(times, 0),
        mask=None if prompt.mask is None else prompt.mask.repeat_interleave(times, 0),
        log_gate=None if prompt.log_gate is None else prompt.log_gate.repeat_interleave(times, 0),
    )


def summarize_choices(records: Sequence[Record], seed: int) -> Summary:
    """Accuracy of the method and of its arms on the same queries, and their paired differences.

    Args:
        records: With `arms`, name to what `choose` returns.
        seed: Seed of the bootstrap.
    """
    weights = bootstrap_weights(len(records), seed)
    summary = Summary()
    right = {}
    for arm in records[0]["arms"]:
        scores = [record["arms"][arm] for record in records]
        right[arm] = [float(score["correct"]) for score in scores]
        values = {"accuracy": bootstrap_mean(right[arm], seed)}
        values |= {key: mean([score[key] for score in scores], weights) for key in scores[0] if key.startswith("kv_")}
        if arm == METHOD:
            summary.metrics = values
            continue
        summary.arms[arm] = values
        gap = torch.tensor(right[METHOD]) - torch.tensor(right[arm])
        resampled = weights @ gap.numpy() / len(records)
        difference = interval(float(gap.mean()), resampled, len(records))
        summary.differences.setdefault("accuracy", {})[arm] = difference
    return summary
