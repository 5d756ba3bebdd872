"""The classifier head."""

from contextlib import nullcontext

import torch
from torch import Tensor, nn


class CompHead(nn.Module):
    """Two-layer perceptron on a hidden state: Linear(D, D), ReLU, Dropout, Linear(D, 1); fp32.

    At D = 4096 it has 16,785,409 parameters.

    Args:
        width: Hidden size D of the base model.
        dropout: Dropout between the layers.
    """

    def __init__(self, width: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Dropout(dropout), nn.Linear(width, 1))

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits `[...]` for hidden states `[..., D]`."""
        device = hidden.device.type
        # Mixed precision would run the matrix products in bf16.
        full = torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()
        with full:
            logits: Tensor = self.layers(hidden.float()).squeeze(-1)
        return logits
