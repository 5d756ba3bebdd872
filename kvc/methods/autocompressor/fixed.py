"""Fixed-length summaries: the final hidden states of kappa summary tokens behind each segment.

Shapes: B batch, n tokens of a segment, D width of the input embeddings.
"""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from kvc.errors import UserError
from kvc.methods.autocompressor.softprompt import SoftPrompt
from kvc.methods.autocompressor.stack import Stack
from kvc.methods.autocompressor.stopping import Draws
from kvc.methods.autocompressor.summary import Report, Segment, Summary


class FixedSummary(Summary):
    """Summary vectors of a fixed number (Chevalier et al. 2023, AutoCompressors, section 3.1).

    The embeddings of the summary tokens are kept and trained in fp32. They begin as the embedding of the EOS token.

    Args:
        model: The base model, with its weights.
        length: Summary tokens of a segment, kappa; 0 compresses nothing.
        accumulate: Vectors of all segments stay; false keeps those of the last one (as RMT does).

    Raises:
        UserError: If the length is negative, or the model has no EOS token.
    """

    def __init__(self, model: PreTrainedModel, length: int = 50, accumulate: bool = True) -> None:
        super().__init__()
        if length < 0:
            raise UserError(f"summary_length: cannot be negative, got {length}")
        self.length, self.accumulate = length, accumulate
        table: Any = model.get_input_embeddings()
        width = table.weight.shape[1]
        self.embed_summary = nn.Embedding(length, width, dtype=torch.float32, device=table.weight.device)
        if length:
            with torch.no_grad():
                row = torch.tensor(_eos(model), device=table.weight.device)
                self.embed_summary.weight.copy_(table(row))

    def slots(self, embedding: nn.Module, embeddings: torch.Tensor) -> torch.Tensor:
        """See `Summary`: the summary tokens."""
        return self.embed_summary.weight.to(embeddings).expand(len(embeddings), -1, -1)

    def summarize(
        self, stack: Stack, segment: Segment, soft: bool, generator: Draws
    ) -> tuple[SoftPrompt, Report | None]:
        """See `Summary`."""
        if not self.length:
            return segment.prompt, None
        active = segment.active
        mask = None if active is None else active[:, None].expand(-1, self.length)
        vectors = segment.slots if mask is None else segment.slots.masked_fill(~mask[..., None], 0)
        new = SoftPrompt(vectors, mask)
        if self.accumulate:
            return segment.prompt.append(new), None
        return (new if active is None else new.where(active, segment.prompt)), None


def _eos(model: PreTrainedModel) -> int:
    """The EOS token; the first one of several."""
    found: Any = model.config.get_text_config(decoder=True).eos_token_id
    found = model.generation_config.eos_token_id if found is None and model.can_generate() else found
    found = found[0] if isinstance(found, list) else found
    if found is None:
        raise UserError("summary_length: the base model names no EOS token, from which summary tokens begin")
    return int(found)
