"""Slots as large as the embeddings they stand beside.

A layer norm of unit gain gives vectors with a root mean square of 1, about a hundred times that of the embeddings of a
large model: the language model has never read such inputs. So the last norm of a compressor starts with the gain that
the embedding table asks for.
"""

import torch
from torch import nn


@torch.no_grad()
def embedding_rms(embeddings: nn.Module) -> float:
    """Root mean square of the entries of an embedding table."""
    weight: torch.Tensor = embeddings.weight  # type: ignore[assignment]
    return float(torch.linalg.vector_norm(weight, dtype=torch.float32) / weight.numel() ** 0.5)


def output_norm(width: int, rms: float) -> nn.LayerNorm:
    """A layer norm whose output has the root mean square `rms` at the start; gain and bias are trained."""
    norm = nn.LayerNorm(width)
    nn.init.constant_(norm.weight, rms)
    return norm


def relative_rms(slots: torch.Tensor, mask: torch.Tensor, rms: float) -> torch.Tensor:
    """Root mean square of slots `[B, M, D]` over that of the embeddings, scalar: 1 is right, to be logged.

    Args:
        slots: `[B, M, D]`.
        mask: bool `[B, M]`, slots that count.
        rms: Of the embedding table.
    """
    count = mask.sum().clamp(min=1) * slots.shape[-1]
    return (slots.detach().float().masked_fill(~mask[..., None], 0.0).square().sum() / count).sqrt() / rms
