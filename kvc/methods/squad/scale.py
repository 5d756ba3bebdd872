"""Slots as large as the embeddings they stand beside.

A layer norm of unit gain gives vectors with a root mean square of 1, about a hundred times that of the embeddings of a
large model: the language model has never read such inputs. So the last norm of a compressor starts with the gain that
the embedding table asks for.
"""

import torch
from torch import nn


@torch.no_grad()
def embedding_rms(embeddings: nn.Module) -> float:
    """Root mean square of what an embedding module gives, over all of its tokens."""
    weight: torch.Tensor = embeddings.weight  # type: ignore[assignment]
    largest = torch.linalg.vector_norm(weight, dim=-1).argmax()[None]
    # Some families scale what they read from the table, each row alike (Gemma).
    given, row = (torch.linalg.vector_norm(x, dtype=torch.float32) for x in (embeddings(largest), weight[largest]))
    rms = torch.linalg.vector_norm(weight, dtype=torch.float32) / weight.numel() ** 0.5
    return float(rms * given / row.clamp(min=torch.finfo(torch.float32).tiny))


def output_norm(width: int, rms: float) -> nn.LayerNorm:
    """A layer norm whose output has the root mean square `rms` at the start; gain and bias are trained."""
    # Means of embeddings have a variance below the usual eps of 1e-5, which would shrink the output.
    norm = nn.LayerNorm(width, eps=1e-12)
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
