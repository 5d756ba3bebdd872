"""How many bytes a row of the KV cache takes."""

import torch
from transformers import PreTrainedModel

from kvc.cache.accounting import cache_bytes
from kvc.core.backbone import decoder


@torch.no_grad()
def row_bytes(model: PreTrainedModel) -> float:
    """Bytes of one token's keys and values in all layers, as the model holds them."""
    ids = torch.zeros(1, 2, dtype=torch.int64, device=model.device)
    return cache_bytes(decoder(model)(ids, use_cache=True).past_key_values) / 2
