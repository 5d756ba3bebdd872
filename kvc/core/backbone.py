"""The base model of every method: a stock Hugging Face causal LM, chosen by one small block of configuration."""

import copy
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import MoeModelOutputWithPast
from transformers.utils import is_flash_attn_2_available

from kvc.core.adapters import adapter_digest, adapter_folder, merge_adapter
from kvc.core.files import digest, digest_files
from kvc.core.seeds import DEFAULT_SEED
from kvc.errors import UserError, first_sentence

TINY = "tiny"


@dataclass
class Lora:
    """Low-rank adapters on the frozen base model (PEFT).

    Attributes:
        r: Rank.
        alpha: Scale; the update is multiplied by alpha / r.
        dropout: Dropout on the adapter's input.
        targets: Names of the linear layers that get an adapter.
    """

    r: int = 8
    alpha: int = 16
    dropout: float = 0.05
    targets: list[str] = field(default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj"])

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            ValueError: If a value is out of range.
        """
        if self.r < 1:
            raise ValueError(f"lora.r must be at least 1, got {self.r}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"lora.dropout must be in [0, 1), got {self.dropout}")


@dataclass
class Backbone:
    """Which base model, in which precision, with which attention.

    Attributes:
        pretrained: `tiny` (the model shipped with kvc), a folder, or a Hub id.
        dtype: Precision in which the weights are loaded; `auto` takes the one they were saved in.
        attn_implementation: Attention kernel of transformers.
        lora: Train low-rank adapters; null trains none.
        from_config: Random weights of the model's shape, from the run's seed; for benchmarks and training from scratch.
        overrides: With `from_config`, fields of the model's config to replace, e.g. `{num_hidden_layers: 4}`.
        gradient_checkpointing: Recompute activations in the backward pass: less memory, about a third more time.
        revision: Branch, tag or commit of a Hub model.
        merge_adapter: PEFT LoRA, a folder or Hub id, that is added to the base model's weights before all else; an
            exported run that trained one will do.
    """

    pretrained: str = TINY
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    attn_implementation: Literal["sdpa", "eager", "flex_attention", "flash_attention_2"] = "sdpa"
    lora: Lora | None = None
    from_config: bool = False
    overrides: dict[str, Any] = field(default_factory=dict)
    gradient_checkpointing: bool = False
    revision: str | None = None
    merge_adapter: str | None = None

    def __post_init__(self) -> None:
        """Check that the settings fit together.

        Raises:
            ValueError: If `overrides` is given without `from_config`, or an attention kernel that is not installed.
        """
        if self.attn_implementation == "flash_attention_2" and not is_flash_attn_2_available():
            raise ValueError(
                "backbone.attn_implementation: flash_attention_2 needs a GPU and the package flash-attn, use sdpa"
            )
        if self.overrides and not self.from_config:
            raise ValueError("backbone.overrides needs backbone.from_config: true, since saved weights have one shape")

    @property
    def location(self) -> str:
        """Folder or Hub id that transformers loads from."""
        return str(tiny_folder()) if self.pretrained == TINY else self.pretrained

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """Load the tokenizer; a model without a pad token gets its EOS token as pad.

        Raises:
            UserError: If there is none at `pretrained`.
        """
        tokenizer = self._load(AutoTokenizer, "tokenizer")
        if not tokenizer.is_fast:
            raise UserError(f"backbone.pretrained: {self.pretrained} has no fast tokenizer, which offsets need")
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

    def load_config(self) -> Any:
        """Load the model's config with `overrides` applied."""
        config = self._load(AutoConfig, "config")
        for key, value in self.overrides.items():
            if not hasattr(config, key):
                raise UserError(f"backbone.overrides: {type(config).__name__} has no field '{key}'")
            setattr(config, key, value)
        return config

    def load(self) -> PreTrainedModel:
        """Build the model: pretrained or random weights, frozen, with LoRA where asked.

        Returns:
            The model in train mode (transformers returns eval mode, which silently turns dropout and gradient
            checkpointing off). With `lora`, a `PeftModel` whose adapters are fp32 and the only trainable part;
            without, every parameter is frozen and the method unfreezes what it trains.

        Raises:
            UserError: If the model cannot be found or read.
        """
        attention: Any = {"attn_implementation": self.attn_implementation}
        if self.from_config:
            dtype = torch.float32 if self.dtype == "auto" else getattr(torch, self.dtype)
            config = self.load_config()
            try:
                model = AutoModelForCausalLM.from_config(config, dtype=dtype, **attention)
            except (ValueError, ImportError) as error:
                reason = first_sentence(str(error))
                raise UserError(f"backbone.from_config: cannot build '{self.pretrained}': {reason}") from error
        else:
            model = self._load(AutoModelForCausalLM, "model", dtype=self.dtype, weights_only=True, **attention)
        if self.merge_adapter is not None:
            model = merge_adapter(model, adapter_folder(self.merge_adapter))
        model.requires_grad_(False)
        if self.lora is not None:
            model = add_lora(model, self.lora)
        if self.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return model.train()

    def identity(self, seed: int = DEFAULT_SEED) -> str:
        """A name of the weights: contents of a local folder, commit of a Hub model, shape and seed of a random one."""
        if self.merge_adapter is None:
            return self._base_identity(seed)
        return digest([self._base_identity(seed), adapter_digest(adapter_folder(self.merge_adapter))])

    def _base_identity(self, seed: int) -> str:
        if self.from_config:
            config = self.load_config().to_dict()
            # Where the folder lies and which version read it do not change the weights.
            for key in ("_name_or_path", "transformers_version"):
                config.pop(key, None)
            return digest([config, seed])
        folder = Path(self.location)
        if folder.is_dir():
            files = [folder / "config.json", folder / "tokenizer.json", *sorted(folder.glob("*.safetensors"))]
            return digest_files(*(file for file in files if file.is_file()))
        commit = getattr(self._load(AutoConfig, "config"), "_commit_hash", None)
        return f"{self.pretrained}@{commit or self.revision or 'unknown'}"

    def _load(self, auto: Any, what: str, **kwargs: Any) -> Any:
        """Call `auto.from_pretrained`, turning its many failures into one sentence."""
        location = self.location
        looks_local = self.pretrained == TINY or location.startswith((".", "/", "~")) or location.count("/") > 1
        if looks_local and not Path(location).is_dir():
            raise UserError(f"backbone.pretrained: there is no folder {location}")
        if Path(location).is_dir() and not (Path(location) / "config.json").is_file():
            raise UserError(f"backbone.pretrained: {location} holds no config.json, so it is not a model folder")
        try:
            return auto.from_pretrained(location, revision=self.revision, trust_remote_code=False, **kwargs)
        except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
            on_hub = not Path(location).is_dir()
            offline = on_hub and os.environ.get("HF_HUB_OFFLINE", "0") not in {"", "0"}
            reason = "HF_HUB_OFFLINE is set, and it is not in the cache" if offline else first_sentence(str(error))
            raise UserError(f"backbone.pretrained: cannot load the {what} of '{self.pretrained}': {reason}") from error


def tiny_folder() -> Path:
    """Folder of the tiny model: `data/tiny-lm` of a checkout, or the copy inside an installed package."""
    package = Path(__file__).resolve().parents[1]
    checkout = package.parent / "data" / "tiny-lm"
    return checkout if checkout.is_dir() else package / "assets" / "tiny-lm"


def add_lora(model: PreTrainedModel, lora: Lora) -> PreTrainedModel:
    """Wrap `model` with PEFT adapters; base frozen, adapters in fp32.

    Raises:
        UserError: If no module has one of the target names.
    """
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(lora.targets),
        task_type="CAUSAL_LM",
    )
    try:
        wrapped = get_peft_model(model, config, autocast_adapter_dtype=True)
    except ValueError as error:
        raise UserError(
            f"backbone.lora.targets: {lora.targets} name no linear layer of {type(model).__name__}"
        ) from error
    return wrapped


def decoder(model: nn.Module) -> nn.Module:
    """The stack below the LM head (embeddings, blocks, final norm), with or without a PEFT wrapper around it."""
    from peft import PeftModel

    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    get_decoder = getattr(base, "get_decoder", None)
    inner: nn.Module = get_decoder() if callable(get_decoder) else base.base_model
    return inner


def head_logits(model: nn.Module, hidden: torch.Tensor, head: nn.Module | None = None) -> torch.Tensor:
    """Logits of hidden states that `decoder(model)` gave, as the model's own forward makes them.

    The LM head alone is not enough: some families cap what it says (Gemma 2) or scale it (Cohere, Granite).

    Args:
        model: A causal LM, with or without a PEFT wrapper.
        hidden: `[..., E]`.
        head: In the place of the model's LM head; None for that one.

    Returns:
        `[..., V]`.
    """
    whole: Any = model
    base = whole.get_base_model() if hasattr(whole, "get_base_model") else whole
    # A copy that shares all weights and has a stack that hands on what it is given: the model itself stays as it is.
    shell = _with(base, decoder(model), _Given())
    if head is not None:
        shell = _with(shell, base.get_output_embeddings(), head)
    logits: torch.Tensor = type(base).forward(shell, inputs_embeds=hidden.reshape(1, -1, hidden.shape[-1])).logits
    return logits.view(*hidden.shape[:-1], logits.shape[-1])


def _with(model: Any, old: nn.Module, new: nn.Module) -> Any:
    """A model that shares everything with another one but a module inside."""
    *outer, last = next(name for name, module in model.named_modules() if module is old).split(".")
    part = whole = copy.copy(model)
    for name in outer:
        inner = copy.copy(part._modules[name])
        part._modules = {**part._modules, name: inner}
        part = inner
    part._modules = {**part._modules, last: new}
    return whole


@dataclass
class _Hidden(MoeModelOutputWithPast):
    """All that heads ask a stack for, of any family."""

    cross_attentions: Any = None


class _Given(nn.Module):
    def forward(self, *args: Any, inputs_embeds: torch.Tensor, **kwargs: Any) -> _Hidden:
        return _Hidden(last_hidden_state=inputs_embeds)
