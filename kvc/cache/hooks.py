"""How a memory tells a stock model about positions and masks: forward pre-hooks, installed once per model.

A cache of transformers learns neither the positions nor the padding of the tokens it is given, and one mask is made
for all layers and heads. Two kinds of hooks close the gap, and do nothing when the cache is an ordinary one:

* on the decoder stack: note positions and padding of the new tokens, fill in position ids that were not given, and
  replace the 2-D mask by one that fits the slots of the memory;
* on each attention module: where layers or heads hold different rows, or a window counts positions instead of slots,
  replace the mask by one made for that layer; and pass on the tap of the memory, if it has one.
"""

import inspect
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from kvc.cache.hooked import HookedCache
from kvc.core.attention import TAP, kernel_of
from kvc.core.backbone import decoder
from kvc.errors import UserError

_MARK = "_kvc_memory_hooks"


def attach(model: PreTrainedModel) -> None:
    """Install the hooks on `model`, unless they are there.

    Raises:
        UserError: If its attention modules cannot be found.
    """
    stack = decoder(model)
    if getattr(stack, _MARK, False):
        return
    modules = attention_modules(stack)
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    if sorted(int(m.layer_idx) for m in modules) != list(range(layers)):  # type: ignore[arg-type]
        raise UserError(f"{type(model).__name__}: a memory needs one attention module with a layer_idx in each layer")
    stack.register_forward_pre_hook(_before_stack, with_kwargs=True)
    stack.register_forward_hook(_after_stack, with_kwargs=True)
    for module in modules:
        module.register_forward_pre_hook(_before_attention, with_kwargs=True)
    setattr(stack, _MARK, True)


def attention_modules(stack: nn.Module) -> list[nn.Module]:
    """The innermost modules that know their layer and take a mask."""

    def takes_mask(module: nn.Module) -> bool:
        return hasattr(module, "layer_idx") and "attention_mask" in inspect.signature(module.forward).parameters

    found = [m for m in stack.modules() if takes_mask(m)]
    return [m for m in found if not any(takes_mask(inner) for inner in m.modules() if inner is not m)]


def _memory(args: tuple[Any, ...], kwargs: dict[str, Any]) -> HookedCache | None:
    """The memory among the arguments: models do not agree on its name."""
    if isinstance(usual := kwargs.get("past_key_values"), HookedCache):
        return usual
    return next((value for value in (*kwargs.values(), *args) if isinstance(value, HookedCache)), None)


def _before_stack(
    stack: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    memory = _memory(args, kwargs)
    if memory is None:
        return None
    named: dict[str, Any] = inspect.signature(stack.forward).bind_partial(*args, **kwargs).arguments if args else {}
    named = {**named.pop("kwargs", {}), **named, **kwargs}
    given = named.get("input_ids")
    given = named["inputs_embeds"] if given is None else given
    mask, positions = memory.begin(
        given.shape[0], given.shape[1], named.get("attention_mask"), named.get("position_ids"), given.device
    )
    return (), {**named, "attention_mask": mask, "position_ids": positions}


def _after_stack(stack: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    memory = _memory(args, kwargs)
    if memory is not None:
        memory.end()


def _before_attention(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    memory = _memory(args, kwargs)
    if memory is None or not (memory.layered or memory.tap):
        return None
    if memory.tap is not None:
        kwargs = {**kwargs, TAP: memory.tap}
    if not memory.layered:
        return args, kwargs
    hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    attention: Any = module.config
    mask = memory.mask(int(module.layer_idx), kernel_of(attention._attn_implementation), hidden.dtype)  # type: ignore[arg-type]
    return args, {**kwargs, "attention_mask": mask}
