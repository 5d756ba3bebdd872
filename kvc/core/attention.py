"""The one attention function of the project: transformers' own, with a door for what methods add.

A model whose attention is `kvc_sdpa`, `kvc_eager` or `kvc_flex_attention` computes what that kernel computes. An object
given to its forward as `kvc_tap` is called in every attention module: it may exchange keys, values and mask before the
product (merged memory), and it sees queries after RoPE and keys before they are repeated (observation windows, sums of
attention).

Shapes: B batch, Hq query heads, Hk KV heads, T new tokens, N keys, D head dimension.
"""

import sys
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, flex_attention_mask, sdpa_mask

from kvc.errors import UserError

TAP = "kvc_tap"
PREFIX = "kvc_"


class Product(NamedTuple):
    """The arguments of one attention product.

    Attributes:
        query: `[B, Hq, T, D]`, after RoPE.
        key: `[B, Hk, N, D]`.
        value: `[B, Hk, N, D]`.
        mask: bool (true is visible) or additive `[B, 1 or Hq, T, N]`; None for causal, all visible where T is 1. With
            FlexAttention a block mask.
        scaling: Factor of the logits.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: Any
    scaling: float


class Tap(Protocol):
    """What may stand at the door."""

    def __call__(self, layer: int, product: Product) -> Product:
        """See, and possibly exchange, the arguments of the product of one layer."""
        ...


def kernel_of(attention: str) -> str:
    """Name of the transformers kernel behind an attention implementation."""
    return attention.removeprefix(PREFIX)


def check_standard(model: Any, who: str) -> None:
    """Refuse a model whose layers do not all attend through transformers' attention interface.

    Args:
        model: A causal LM, with or without a PEFT wrapper.
        who: What needs it, for the sentence.

    Raises:
        UserError: If it keeps a recurrent state, or computes attention in a way of its own.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if base._is_stateful or not base._supports_attention_backend:
        raise UserError(
            f"backbone.pretrained: {type(base).__name__} has no standard attention in each layer, which {who} needs"
        )


def check_window(model: PreTrainedModel, length: int) -> None:
    """Refuse a text that reaches beyond a sliding window, where layers would not see its memory.

    Args:
        model: A causal LM, with or without a PEFT wrapper.
        length: Positions of the whole text.

    Raises:
        UserError: If a layer of the model looks back less far.
    """
    config: Any = model.config.get_text_config(decoder=True)
    reach = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}
    kinds = set(getattr(config, "layer_types", None) or ["sliding_attention"]) & reach.keys()
    window = min((getattr(config, reach[kind], None) or length for kind in kinds), default=length)
    if length > window:
        raise UserError(
            f"a sequence of {length} tokens is longer than the sliding window of the base model ({window}), "
            "beyond which nothing is remembered: use shorter sequences or another model"
        )


def open_door(model: PreTrainedModel, kernels: Sequence[str] = ("sdpa", "eager")) -> None:
    """Switch a model to the attention function with the door; numbers stay as they are.

    Args:
        model: A causal LM.
        kernels: Those of whose masks the taps to come can make sense.

    Raises:
        UserError: If its attention kernel is another one.
    """
    attention = str(model.config._attn_implementation)
    if kernel_of(attention) not in kernels:
        raise UserError(
            f"attn_implementation: nobody can see the queries of '{kernel_of(attention)}' attention, which this policy "
            f"or method needs: use {' or '.join(kernels)}"
        )
    if not attention.startswith(PREFIX):
        model.set_attn_implementation(PREFIX + attention)


def _through(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None,
    tap: Tap | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    if tap is None:
        return query, key, value, attention_mask
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    product = tap(int(module.layer_idx), Product(query, key, value, attention_mask, scale))  # type: ignore[arg-type]
    return product[:4]


def _sdpa(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    kvc_tap: Tap | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    inputs = _through(module, query, key, value, attention_mask, scaling, kvc_tap)
    biased = kwargs.get("softcap") is not None or kwargs.get("position_bias") is not None
    if torch.compiler.is_compiling() and query.shape[2] == 1 and inputs[3] is not None and not biased:
        return _packed(*inputs[:3], inputs[3], scaling, kwargs.get("dropout", 0.0)), None
    return sdpa_attention_forward(module, *inputs, scaling=scaling, **kwargs)


def _packed(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    scaling: float | None,
    dropout: float,
) -> torch.Tensor:
    """Attention of one token, the query heads of a group standing where tokens stand; returns `[B, 1, Hq, D]`.

    transformers does the same, but not in compiled code, where it copies every key for every query head.
    """
    kv_heads = key.shape[1]
    grouped = query.reshape(len(query), kv_heads, -1, query.shape[-1])
    if mask.shape[1] > 1:
        mask = mask.reshape(len(mask), kv_heads, -1, mask.shape[-1])
    product = torch.nn.functional.scaled_dot_product_attention(
        grouped, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling
    )
    return product.flatten(1, 2)[:, None]


def _eager(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    kvc_tap: Tap | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    inputs = _through(module, query, key, value, attention_mask, scaling, kvc_tap)
    # Each family has an eager function of its own (softcapping, sinks), beside its attention module.
    own = sys.modules[type(module).__module__].eager_attention_forward
    output: tuple[torch.Tensor, torch.Tensor | None] = own(module, *inputs, scaling=scaling, **kwargs)
    return output


def _flex(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    kvc_tap: Tap | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    inputs: Any = _through(module, query, key, value, attention_mask, scaling, kvc_tap)
    output: tuple[torch.Tensor, torch.Tensor | None] = flex_attention_forward(
        module, *inputs, scaling=scaling, **kwargs
    )
    return output


AttentionInterface.register("kvc_sdpa", _sdpa)
AttentionInterface.register("kvc_eager", _eager)
# Without a mask function of the same name, transformers drops the 2-D padding mask silently.
AttentionMaskInterface.register("kvc_sdpa", sdpa_mask)
AttentionMaskInterface.register("kvc_eager", eager_mask)
AttentionInterface.register("kvc_flex_attention", _flex)
AttentionMaskInterface.register("kvc_flex_attention", flex_attention_mask)
