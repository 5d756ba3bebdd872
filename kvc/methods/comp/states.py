"""Running the frozen model over traces."""

from collections.abc import Sequence
from typing import Any

import torch

from kvc.core.backbone import decoder

TOKENS_PER_BATCH = 16384


@torch.inference_mode()
def reasoning_states(
    model: Any, prompts: Sequence[Sequence[int]], reasonings: Sequence[Sequence[int]], budget: int = TOKENS_PER_BATCH
) -> list[torch.Tensor]:
    """Last hidden states, after the final norm, at every reasoning token.

    Traces of similar length share a batch. Rows are padded on the right under causal attention, so padding is never
    seen and needs no mask.

    Args:
        model: Causal LM; put in eval mode for the call.
        prompts: Prompt tokens of each trace.
        reasonings: Reasoning tokens of each trace.
        budget: Padded tokens of a batch.

    Returns:
        For each trace `[T_i, D]` in the model's precision.
    """
    was_training = model.training
    model.eval()
    rows = [[*prompt, *reasoning] for prompt, reasoning in zip(prompts, reasonings)]
    states: list[torch.Tensor] = [torch.empty(0)] * len(rows)
    for batch in _batches([len(row) for row in rows], budget):
        longest = max(len(rows[i]) for i in batch)
        input_ids = torch.tensor([[*rows[i], *[0] * (longest - len(rows[i]))] for i in batch], device=model.device)
        hidden = decoder(model)(input_ids=input_ids, use_cache=False).last_hidden_state
        for row, i in enumerate(batch):
            states[i] = hidden[row, len(prompts[i]) : len(rows[i])]
    model.train(was_training)
    return states


def _batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Indices sorted by length, cut so that rows times longest stays within `budget`."""
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batches and (len(batches[-1]) + 1) * lengths[i] <= budget:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches
