"""Conditional LoRA: a standard PEFT LoRA that acts on some tokens only.

y = W x + (alpha / r) B A dropout(x) for the chosen tokens, y = W x for the others, bit for bit. The product with A is
made for the chosen tokens alone, which are few: it costs little and keeps few activations.

The choice travels as an argument of the forward (`kvc_gate`) down to each attention module, which notes it for the
adapters of its layer. So a layer that gradient checkpointing runs again in the backward gets the choice of its own
forward, whatever ran in between.

Shapes: B batch, T tokens, G chosen tokens.
"""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from kvc.cache.hooks import attention_modules
from kvc.core.backbone import decoder
from kvc.errors import UserError

GATE = "kvc_gate"
_MARK = "_kvc_gated"


def gate_lora(model: PreTrainedModel) -> None:
    """Make the adapters of a model conditional, unless they are.

    From then on they act on the tokens that a forward names: `model(..., kvc_gate=index)`, with `index` int64 `[G]`
    into the flattened batch `B * T`. Without the argument they act on none.

    Args:
        model: A model with PEFT LoRA.

    Raises:
        UserError: If it has none, a variant that is no plain LoRA, or adapters outside its layers.
    """
    from peft.tuners.lora import LoraLayer

    stack = decoder(model)
    if is_gated(model):
        return
    adapters = {name: module for name, module in stack.named_modules() if isinstance(module, LoraLayer)}
    names = {module: name for name, module in stack.named_modules()}
    if not adapters:
        raise UserError("cond_lora: there is no LoRA to make conditional, set backbone.lora")
    if any(isinstance(m, LoraLayer) and m not in names for m in model.modules()):
        raise UserError("backbone.lora.targets: a conditional LoRA cannot be on the LM head")
    for attention in attention_modules(stack):
        layer = names[attention].rpartition(".")[0]
        choice = _Choice()
        attention.register_forward_pre_hook(choice.note, with_kwargs=True)
        for name in [name for name in adapters if name.startswith(f"{layer}.")]:
            _gate(adapters.pop(name), choice)
    if adapters:
        raise UserError(
            f"backbone.lora.targets: a conditional LoRA must lie in a layer, {next(iter(adapters))} does not"
        )
    setattr(stack, _MARK, True)


def is_gated(model: PreTrainedModel) -> bool:
    """Whether the adapters of a model are conditional."""
    return bool(getattr(decoder(model), _MARK, False))


class _Choice:
    """The chosen tokens of the forward that a layer is in."""

    def __init__(self) -> None:
        self.index: torch.Tensor | None = None

    def note(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.index = kwargs.get(GATE)


class _Gate:
    """Narrows the input of one adapter to the chosen tokens, and widens its output again."""

    def __init__(self, choice: _Choice) -> None:
        self.choice = choice
        self.shape: torch.Size = torch.Size()

    def narrow(self, module: nn.Module, args: tuple[torch.Tensor, ...]) -> torch.Tensor:
        (x,) = args
        self.shape = x.shape[:-1]
        index = self.choice.index
        flat = x.reshape(-1, x.shape[-1])
        return flat[:0] if index is None else flat.index_select(0, index)

    def widen(self, module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        wide = output.new_zeros(self.shape.numel(), output.shape[-1])
        index = self.choice.index
        wide = wide if index is None else wide.index_copy(0, index, output)
        return wide.view(*self.shape, -1)


def _gate(module: Any, choice: _Choice) -> None:
    if module.lora_variant:
        raise UserError("backbone.lora: a conditional LoRA must be a plain one, without DoRA or other variants")
    # PEFT computes lora_B(lora_A(lora_dropout(x))), with one module of each for every adapter.
    for name in module.lora_A:
        gate = _Gate(choice)
        module.lora_dropout[name].register_forward_pre_hook(gate.narrow)
        module.lora_B[name].register_forward_hook(gate.widen)
