"""Keys moved to other positions are the keys that the model itself makes there."""

import pytest
import torch
from kv_models import tiny, tokens

from kvc.cache.memory import KVMemory
from kvc.errors import UserError

ROTARY = ["llama", "llama3-rope", "yarn", "qwen2", "gemma3", "cohere", "phi"]
KEPT = torch.tensor([[[0, 1, 4, 7, 9], [1, 9, 3, 5, 6]], [[2, 3, 4, 5, 6], [0, 1, 2, 8, 9]]])
"""For two rows of a batch and two heads; one head in another order than time."""


def shrunken(family: str, dtype: torch.dtype = torch.float32) -> tuple[KVMemory, torch.Tensor]:
    model = tiny(family)
    ids = tokens(2, 10)
    memory = KVMemory(model)
    with torch.no_grad():
        model(ids, past_key_values=memory)
    kept = KEPT if memory.layers[0].keys.shape[1] == 2 else KEPT.repeat_interleave(2, dim=1)
    for layer in range(2):
        memory.keep(layer, kept)
    return memory, ids


@torch.no_grad()
@pytest.mark.parametrize("family", ROTARY)
@pytest.mark.parametrize(
    ("mode", "prefix", "target_end"), [("compact", 0, None), ("compact", 2, None), ("place", 2, 40)]
)
def test_layer_0_has_the_keys_of_a_fresh_forward(family: str, mode: str, prefix: int, target_end: int | None) -> None:
    """In the first layer, a key depends on its token and position alone."""
    model = tiny(family)
    memory, ids = shrunken(family)
    before = memory.layers[0]
    original = before.positions.clone()
    memory.rotate(mode, prefix, target_end)  # type: ignore[arg-type]
    after = memory.layers[0]
    for row in range(2):
        for head in range(after.keys.shape[1]):
            old = original[row, head].sort().values
            new = after.positions[row, head]
            still = old < prefix
            block = int((~still).sum())
            start = prefix if target_end is None else target_end - block
            assert new.tolist() == [*old[still].tolist(), *range(start, start + block)]
            fresh = KVMemory(model)
            model(ids[row, old][None], past_key_values=fresh, position_ids=new[None])
            assert torch.allclose(after.keys[row, head], fresh.layers[0].keys[0, head], atol=1e-5)
            assert torch.allclose(after.values[row, head], fresh.layers[0].values[0, head], atol=1e-5)
    ends = after.positions.flatten(1).amax(1) + 1
    assert memory.next_position.tolist() == (ends.tolist() if target_end is None else [40, 40])


@torch.no_grad()
@pytest.mark.parametrize("mode", ["compact", "place"])
def test_a_compacted_memory_of_one_layer_is_the_kept_text(mode: str) -> None:
    """Nothing but the kept tokens and their new places is left, so the plain model on them gives the same logits."""
    model, ids, new = tiny("one-layer"), tokens(1, 10), tokens(1, 3, seed=1)
    kept = [0, 1, 4, 7, 9]
    memory = KVMemory(model)
    model(ids, past_key_values=memory)
    memory.keep(0, torch.tensor([7, 0, 9, 1, 4]).expand(1, 2, -1))
    memory.rotate(mode, target_end=20 if mode == "place" else None)  # type: ignore[arg-type]
    ours = model(new, **memory.forward_kwargs(new)).logits
    text = torch.cat([ids[:, kept], new], dim=1)
    positions = torch.arange(8)[None] + (15 if mode == "place" else 0)
    plain = model(text, position_ids=positions, use_cache=False).logits[:, 5:]
    assert torch.allclose(ours, plain, atol=1e-5)
    # And generate goes on from there too.
    fork = memory.fork()
    more = tokens(1, 2, seed=2)
    tokens_ours = model.generate(
        more, **fork.generate_kwargs(more), max_new_tokens=4, do_sample=False, eos_token_id=None
    )
    assert fork.layers[0].positions[0, 0, -5:].tolist() == [int(positions[0, -1]) + i for i in range(1, 6)]
    assert tokens_ours.shape == (1, 6)


def test_keys_are_turned_in_fp32_and_rounded_once() -> None:
    """bf16 keys moved far away and back differ from the original by their own rounding, not by that of an angle."""
    memory, _ = shrunken("llama")
    exact = KVMemory(tiny("llama"))
    coarse = KVMemory(tiny("llama"))
    for layer in range(2):
        keys = memory.layers[layer].keys.bfloat16()
        positions = torch.arange(5).expand(2, -1)
        exact.append(layer, keys.float(), keys.float(), positions)
        coarse.append(layer, keys, keys, positions)
    for m in (exact, coarse):
        m.rotate("place", target_end=200)
    assert coarse.layers[0].keys.dtype == torch.bfloat16
    assert torch.equal(coarse.layers[0].keys, exact.layers[0].keys.bfloat16())


def test_keep_mode_changes_nothing() -> None:
    memory, _ = shrunken("llama")
    before = [layer.keys.clone() for layer in memory.layers]
    memory.rotate("keep")
    assert all(torch.equal(layer.keys, keys) for layer, keys in zip(memory.layers, before))
    assert memory.next_position.tolist() == [10, 10]


def test_heads_of_different_length_end_together_when_placed() -> None:
    memory, _ = shrunken("llama")
    memory.keep(0, torch.tensor([[[-1, -1, 0], [2, 3, 4]]]).expand(2, -1, -1))
    memory.rotate("place", target_end=30)
    assert memory.layers[0].positions[0].tolist() == [[-1, -1, 29], [27, 28, 29]]
    memory.rotate("compact")
    assert memory.layers[0].positions[0].tolist() == [[-1, -1, 0], [0, 1, 2]]
    assert memory.next_position.tolist() == [5, 5]


@pytest.mark.parametrize(
    ("family", "arguments", "sentence"),
    [
        ("dynamic", {"mode": "compact"}, "dynamic rotary scaling"),
        ("opt", {"mode": "compact"}, "no rotary positions"),
        ("llama", {"mode": "place", "target_end": 4, "prefix": 2}, "at least 7"),
        ("llama", {"mode": "place"}, "target_end is needed"),
        ("llama", {"mode": "compact", "target_end": 9}, "no effect"),
        ("llama", {"mode": "shuffle"}, "not one of keep, compact, place"),
        ("llama", {"mode": "compact", "prefix": -1}, "negative"),
    ],
)
def test_what_cannot_be_done_is_said_and_nothing_changes(family: str, arguments: dict, sentence: str) -> None:
    memory, _ = shrunken(family)
    memory.keep(0, torch.tensor([0, 1, 2]).expand(2, memory.layers[0].keys.shape[1], -1))
    before = [(layer.keys.clone(), layer.positions.clone()) for layer in memory.layers]
    with pytest.raises(UserError, match=sentence):
        memory.rotate(**arguments)
    for layer, (keys, positions) in zip(memory.layers, before):
        assert torch.equal(layer.keys, keys)
        assert torch.equal(layer.positions, positions)
