"""Feeding tokens to a model whose memory grows, and writing on from there without leaving a trace."""

import inspect
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvc.cache.memory import KVMemory
from kvc.generation.decode import generate
from kvc.generation.output import Finish
from kvc.generation.progress import DecodeProgress
from kvc.generation.sampling import Greedy, Sampler, Sampling
from kvc.generation.stopping import StopStrings
from kvc.methods.study.layouts import END_THINK

END = "---"
"""Ends a summary."""


@torch.no_grad()
def read(model: PreTrainedModel, memory: KVMemory, ids: Sequence[int], chunk: int) -> None:
    """Put tokens into a memory of one row.

    Args:
        model: In eval mode.
        memory: Grows in place.
        ids: Token ids.
        chunk: Tokens of one forward; where heads keep rows at different positions a mask of this many rows is made.
    """
    last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    for start in range(0, len(ids), chunk):
        tokens = torch.tensor([list(ids[start : start + chunk])], device=model.device)
        model(input_ids=tokens, **memory.forward_kwargs(tokens), use_cache=True, **last)


def reread(model: PreTrainedModel, ids: Sequence[int], chunk: int) -> KVMemory:
    """The memory of a text that nothing is evicted from."""
    memory = KVMemory(model)
    read(model, memory, ids, chunk)
    return memory


def write(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    memory: KVMemory,
    prompt: Sequence[int],
    max_new_tokens: int,
    sampler: Sampler,
    progress: bool = False,
) -> tuple[str, int, Finish]:
    """Write on after a prompt; the memory stays as it is.

    Args:
        model: In eval mode.
        tokenizer: Of the model.
        memory: What came before, one row.
        prompt: Token ids, read by a copy of the memory.
        max_new_tokens: Limit.
        sampler: Chooses tokens.
        progress: Show a bar.

    Returns:
        The text up to `---` or the end of the thinking, the number of tokens it took, and what ended it.
    """
    copy = memory.fork()
    copy.tap = None  # queries of this text score nothing
    with DecodeProgress(max_new_tokens, 1, enabled=progress) as bar:
        output = generate(
            model,
            torch.tensor([list(prompt)], device=model.device),
            max_new_tokens=max_new_tokens,
            memory=copy,
            sampler=sampler,
            stop=StopStrings([END, END_THINK], tokenizer),
            tokenizer=tokenizer,
            progress=bar,
        )
    assert output.texts is not None
    return output.texts[0].strip(), len(output.tokens[0]), output.finish[0]


def sampler_of(temperature: float, top_p: float, seeds: int | Sequence[int]) -> Sampler:
    """Greedy at a temperature of 0, draws otherwise.

    Args:
        temperature: Divides the logits.
        top_p: Share of the probability that is drawn from.
        seeds: One for all rows, or one for each.
    """
    return Greedy() if temperature == 0 else Sampling(temperature, top_p, seed=seeds)
