"""Decoding after summary vectors, by `generate` of transformers with a KV cache that holds them.

Shapes: B batch, T tokens of the prompts.
"""

from typing import Any

import torch
from transformers import DynamicCache

from kvc.errors import UserError
from kvc.methods.autocompressor.compressor import Compressor
from kvc.methods.autocompressor.softprompt import SoftPrompt
from kvc.methods.autocompressor.stack import Columns


def generate(
    compressor: Compressor,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    prompt: SoftPrompt | None,
    **kwargs: Any,
) -> Any:
    """Continue prompts by `generate` of transformers.

    Args:
        compressor: The model, in eval mode.
        input_ids: `[B, T]`, left-padded.
        attention_mask: `[B, T]`, 0 for padding; None for no padding.
        prompt: The soft prompt; None for none.
        **kwargs: Further settings of `generate`.

    Returns:
        Prompts and new tokens, `[B, T + new]`, or what `kwargs` ask for.

    Raises:
        UserError: If the model is in train mode, or the prompts are not left-padded.
    """
    check_request(compressor, input_ids, attention_mask)
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
    limit, most = compressor.stack.positions.limit, int(mask.sum(-1).max()) + int(kwargs.get("max_new_tokens") or 0)
    if limit is not None and most > limit:
        raise UserError(f"max_new_tokens: prompt and answer need {most} positions, the base model has {limit}")
    arguments: dict[str, Any] = {"attention_mask": mask}
    positions = compressor.stack.positions
    text = torch.ones(input_ids.shape[1], dtype=torch.bool, device=input_ids.device)
    held: Columns | None = None
    if prompt is not None and prompt.vectors.shape[1]:
        if kwargs.get("use_cache") is False:
            raise UserError("use_cache: false is not possible with summary vectors, which are held in the cache")
        held, cache = prefilled(compressor, prompt.expand(len(input_ids)))
        cache.batch_repeat_interleave(_copies(compressor, kwargs))
        arguments["past_key_values"] = cache
        arguments["attention_mask"] = torch.cat([held.valid.long(), mask], dim=1)
        text = torch.cat([held.text, text])
    arguments["position_ids"] = positions.ids(arguments["attention_mask"].bool(), text)
    hidden = compressor.summary.unwritable()
    if hidden:
        kwargs["suppress_tokens"] = [*(kwargs.get("suppress_tokens") or []), *hidden]
    base: Any = compressor.model
    base = base.get_base_model() if hasattr(base, "get_base_model") else base
    return base.generate(input_ids, **arguments, **kwargs)


def prefilled(compressor: Compressor, prompt: SoftPrompt) -> tuple[Columns, DynamicCache]:
    """The columns of a soft prompt, and a cache that holds it.

    Raises:
        UserError: If its vectors have gates.
    """
    if prompt.log_gate is not None:
        raise UserError("softprompt: decoding takes vectors without gates, compress in eval mode")
    embedding: Any = compressor.model.get_input_embeddings()
    prompt = prompt.to(embedding.weight)
    columns, cache = Columns.of_prompt(prompt), DynamicCache()
    compressor.stack.read(prompt.vectors, columns, cache)
    return columns, cache


def _copies(compressor: Compressor, kwargs: dict[str, Any]) -> int:
    """Rows that `generate` makes of each prompt: beams or samples."""
    configured = kwargs.get("generation_config") or compressor.model.generation_config
    counts = (kwargs.get(name) or getattr(configured, name, None) for name in ("num_beams", "num_return_sequences"))
    return max(1, *(int(count or 1) for count in counts))


def check_request(compressor: Compressor, input_ids: torch.Tensor, mask: torch.Tensor | None) -> None:
    """Refuse a model in train mode, and prompts that are empty or padded on the right.

    Raises:
        UserError: If so.
    """
    if compressor.model.training:
        raise UserError("model: decoding in train mode would drop activations at random, call model.eval() first")
    if input_ids.numel() == 0 or (mask is not None and not bool(mask[:, -1].all())):
        raise UserError("attention_mask: prompts must not be empty, and shorter ones are padded on the left")
