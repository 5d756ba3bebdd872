"""Moving keys to other positions: undo the rotation they were stored with and apply another, exactly.

A rotary key at position p is the unrotated key turned by p * inv_freq in each pair of channels, so turning it by
(new - old) * inv_freq moves it. Angles are taken as the model takes them (fp32 products) and subtracted in fp64, keys
are turned in fp32 and rounded once. Scaled frequencies (linear, llama3, yarn) need nothing more: yarn's attention
factor is in the stored key already. Dynamic NTK and longrope change their frequencies with the length of the text, so
keys of an earlier length cannot be moved exactly and are refused.

Shapes: B batch, H KV heads, N slots, D head dimension, F frequencies.
"""

import sys
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from kvc.core.backbone import decoder
from kvc.errors import UserError

Mode = Literal["keep", "compact", "place"]
Style = Literal["halves", "pairs"]


class Rotation:
    """The rotary embedding of one model.

    Args:
        model: A causal LM.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._name = type(model).__name__
        self._stack: Any = decoder(model)
        self._config: Any = model.config.get_text_config(decoder=True)
        self._rope: Any = getattr(self._stack, "rotary_emb", None)
        self._known: dict[str | None, tuple[torch.Tensor, Style]] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> "Rotation":
        """A copied memory belongs to the same model."""
        return self

    def move(self, layer: int, keys: torch.Tensor, old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        """Turn keys from their positions to others.

        Args:
            layer: Layer that the keys are from.
            keys: `[B, H, N, D]`, rotated to `old`.
            old: Positions `[B, H, N]`; rows at a negative one are left as they are.
            new: Positions `[B, H, N]`.

        Returns:
            Keys `[B, H, N, D]` rotated to `new`, in the precision of `keys`; a row that does not move keeps its bits.

        Raises:
            UserError: If the keys of this model cannot be moved.
        """
        inv_freq, style = self._frequencies(layer)
        inv_freq = inv_freq.to(keys.device, torch.float32)
        angle = (new[..., None].float() * inv_freq).double() - (old[..., None].float() * inv_freq).double()
        angle = angle.masked_fill((old < 0)[..., None], 0.0)
        cos, sin = angle.cos().float(), angle.sin().float()
        size = 2 * inv_freq.shape[0]
        turned, rest = keys[..., :size].float(), keys[..., size:]
        if style == "halves":
            first, second = turned.chunk(2, dim=-1)
            turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
        else:
            first, second = turned[..., 0::2], turned[..., 1::2]
            turned = torch.stack([first * cos - second * sin, second * cos + first * sin], dim=-1).flatten(-2)
        return torch.cat([turned.to(keys.dtype), rest], dim=-1)

    def check(self) -> None:
        """Refuse models whose keys cannot be moved.

        Raises:
            UserError: If the model has no rotary positions, or frequencies that depend on the length of the text.
        """
        for layer in range(self._config.num_hidden_layers):
            self._frequencies(layer)

    def _frequencies(self, layer: int) -> tuple[torch.Tensor, Style]:
        """Frequencies `[F]` of a layer, and which channels form a pair."""
        types = getattr(self._config, "layer_types", None)
        kind = types[layer] if types is not None and isinstance(getattr(self._rope, "rope_type", None), dict) else None
        if kind not in self._known:
            self._known[kind] = self._examine(kind)
        return self._known[kind]

    def _examine(self, kind: str | None) -> tuple[torch.Tensor, Style]:
        """Find the frequencies, and try them on the model's own function."""
        apply: Any = getattr(sys.modules[type(self._stack).__module__], "apply_rotary_pos_emb", None)
        if not isinstance(self._rope, nn.Module) or apply is None:
            raise UserError(f"{self._name} has no rotary positions, so its keys cannot be moved to other positions")
        parameters = self._config.rope_parameters
        parameters = parameters if kind is None else parameters[kind]
        if parameters["rope_type"] in {"dynamic", "longrope"}:
            raise UserError(
                f"{self._name} has {parameters['rope_type']} rotary scaling, whose frequencies change with the length "
                "of the text, so its keys cannot be moved to other positions exactly"
            )
        inv_freq: torch.Tensor = getattr(self._rope, "inv_freq" if kind is None else f"{kind}_inv_freq")
        for style in ("halves", "pairs"):
            if self._agrees(apply, kind, inv_freq, style):
                return inv_freq, style
        raise UserError(f"{self._name} rotates its keys in a way that kvc does not know, so they cannot be moved")

    def _agrees(self, apply: Any, kind: str | None, inv_freq: torch.Tensor, style: Style) -> bool:
        """Whether keys moved from 3 to 11 are those that the model itself rotates to 11."""
        device, size = inv_freq.device, 2 * inv_freq.shape[0]
        heads = self._config.num_attention_heads
        head_dim = getattr(self._config, "head_dim", None) or self._config.hidden_size // heads
        partial = self._config.rope_parameters if kind is None else self._config.rope_parameters[kind]
        factor = partial.get("partial_rotary_factor", getattr(self._config, "partial_rotary_factor", None)) or 1.0
        if size != int(head_dim * factor) or hasattr(self._config, "qk_rope_head_dim") or "mrope_section" in partial:
            return False
        x = torch.randn(1, 1, 1, size, generator=torch.Generator().manual_seed(0)).to(device)
        more = () if kind is None else (kind,)

        def at(position: int) -> torch.Tensor:
            cos, sin = self._rope(x, torch.tensor([[position]], device=device), *more)
            return apply(x, x, cos, sin)[1]

        self._known[kind] = (inv_freq, style)
        try:
            layer = 0 if kind is None else self._config.layer_types.index(kind)
            old = torch.full((1, 1, 1), 3, device=device)
            return torch.allclose(self.move(layer, at(3), old, old + 8), at(11), atol=1e-5)
        finally:
            del self._known[kind]


def compacted(positions: torch.Tensor, prefix: int) -> torch.Tensor:
    """New positions for rows in order of time: the prefix stays, the others follow it without a gap.

    Args:
        positions: Sorted positions `[B, H, N]`, -1 first.
        prefix: Rows at positions below it stay.

    Returns:
        Positions `[B, H, N]`; -1 stays -1.
    """
    moved = positions >= prefix
    return torch.where(moved, prefix + moved.long().cumsum(-1) - 1, positions)


def placed(positions: torch.Tensor, prefix: int, target_end: int) -> torch.Tensor:
    """New positions for rows in order of time: the prefix stays, the others form a block that ends at a target.

    Args:
        positions: Sorted positions `[B, H, N]`, -1 first.
        prefix: Rows at positions below it stay.
        target_end: Position after the block's last row.

    Returns:
        Positions `[B, H, N]`; -1 stays -1.
    """
    moved = positions >= prefix
    later = moved.long().flip(-1).cumsum(-1).flip(-1)
    return torch.where(moved, target_end - later, positions)
