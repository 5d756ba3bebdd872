"""After rows are dropped, logits are those of the whole text with the dropped rows masked, in every layer and head."""

import pytest
import torch
from kv_models import indices_of, masked_logits, tiny, tokens

from kvc.cache.memory import KVMemory

PROMPT = 10
WINDOWS: dict[str, list[int | None]] = {"mistral": [5, 5], "gemma3": [5, None]}


def choices(kind: str, heads: int) -> list[torch.Tensor]:
    """bool [heads, PROMPT] for each of two layers."""
    generator = torch.Generator().manual_seed(3)
    kept = []
    for layer in range(2):
        rows = torch.zeros(heads, PROMPT, dtype=torch.bool)
        for head in range(heads):
            size = {"equal": 5, "few": 2, "layers": 4 + 3 * layer, "heads": 3 + head + layer}[kind]
            rows[head, torch.randperm(PROMPT, generator=generator)[:size]] = True
        kept.append(rows)
    return kept


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["equal", "few", "layers", "heads"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "opt", "mistral", "gemma3"])
def test_logits_are_those_of_a_masked_forward(family: str, kind: str, attention: str) -> None:
    model, ids = tiny(family, attention), tokens(1, PROMPT + 8)
    kept = choices(kind, 4 if family == "opt" else 2)
    reference = masked_logits(model, ids, PROMPT, kept, WINDOWS.get(family))
    memory = KVMemory(model)
    prompt = model(ids[:, :PROMPT], **memory.forward_kwargs(ids[:, :PROMPT])).logits
    assert torch.allclose(prompt, reference[:, :PROMPT], atol=1e-5)
    for layer, rows in enumerate(kept):
        memory.keep(layer, indices_of(rows))
    # One by one, and several tokens at once.
    logits = []
    for start, stop in ((10, 11), (11, 14), (14, 15), (15, 16), (16, 18)):
        part = ids[:, start:stop]
        logits.append(model(part, **memory.forward_kwargs(part)).logits)
    assert torch.allclose(torch.cat(logits, dim=1), reference[:, PROMPT:], atol=1e-5)
    for layer, rows in enumerate(kept):
        for head, row in enumerate(rows):
            positions = memory.layers[layer].positions[0, head]
            assert positions[positions >= 0].tolist() == [*row.nonzero().flatten().tolist(), *range(10, 18)]


@torch.no_grad()
def test_order_in_storage_does_not_matter() -> None:
    """Policies may store rows by score."""
    model, ids, new = tiny("mistral"), tokens(1, 8), tokens(1, 4, seed=1)
    results = []
    for order in ([1, 3, 4, 6, 7], [6, 1, 7, 4, 3]):
        memory = KVMemory(model)
        model(ids, past_key_values=memory)
        for layer in range(2):
            memory.keep(layer, torch.tensor(order).expand(1, 2, -1))
        results.append(model(new, past_key_values=memory).logits)
    assert torch.allclose(*results, atol=1e-5)


@torch.no_grad()
def test_what_was_dropped_can_change_nothing() -> None:
    model, ids, new = tiny("llama"), tokens(1, 8), tokens(1, 4, seed=1)
    results = []
    for poison in (False, True):
        memory = KVMemory(model)
        model(ids, past_key_values=memory)
        for layer in memory.layers:
            if poison:
                layer.rows[0][0][:, :, 2:5] = torch.nan
                layer.rows[1][0][:, :, 2:5] = torch.nan
        for layer in range(2):
            memory.keep(layer, torch.tensor([0, 1, 5, 6, 7]).expand(1, 2, -1))
        results.append(model(new, past_key_values=memory).logits)
    assert torch.equal(*results)


@torch.no_grad()
def test_dropped_text_is_gone_from_a_model_of_one_layer() -> None:
    model, ids = tiny("one-layer"), tokens(1, 8)
    other = ids.clone()
    other[:, 2:5] = tokens(1, 3, seed=9)
    results = []
    for prompt in (ids, other):
        memory = KVMemory(model)
        model(prompt, past_key_values=memory)
        memory.keep(0, torch.tensor([0, 1, 5, 6, 7]).expand(1, 2, -1))
        results.append(model(tokens(1, 4, seed=1), past_key_values=memory).logits)
    assert torch.equal(*results)


def test_gradients_reach_the_kept_rows() -> None:
    model = tiny("llama")
    embeddings = model.get_input_embeddings()(tokens(1, 6)).detach().requires_grad_()
    memory = KVMemory(model)
    model(inputs_embeds=embeddings, past_key_values=memory)
    for layer in range(2):
        memory.keep(layer, torch.tensor([3, 5]).expand(1, 2, -1))
        memory.merge(layer, (1, 2), (0, 1), 0.5)
    model(tokens(1, 2), past_key_values=memory).logits.sum().backward()
    assert embeddings.grad is not None
    assert embeddings.grad.abs().sum(-1).gt(0).tolist() == [[True] * 6]
