"""A memory in fixed buffers: the rows of an ordinary one, at constant addresses, whatever is done to both."""

import functools

import pytest
import torch
from kv_models import left_padded, tiny, tokens
from torch import Tensor

from kvc.cache.accounting import storage_bytes
from kvc.cache.memory import KVMemory
from kvc.cache.static import StaticMemory
from kvc.errors import UserError
from kvc.generation.static import StaticStep

CAPACITY = 24


def prefilled(family: str = "llama", attention: str = "sdpa", weigh: bool = False) -> KVMemory:
    """Two rows, the first with 4 empty slots; heads and layers of the second hold different rows."""
    model = tiny(family, attention)
    memory = KVMemory(model)
    for layer in memory.layers if weigh else []:
        layer.weigh()
    ids, mask = left_padded([tokens(5), tokens(9, seed=1)])
    with torch.no_grad():
        model(ids, **memory.forward_kwargs(ids, mask))
    heads = memory.layers[0].keys.shape[1]
    slots = torch.arange(9).expand(2, heads, -1).clone()
    slots[0, :, :4] = -1
    slots[1, 0, 3] = -1
    memory.keep(1, slots)
    for number, layer in enumerate(memory.layers if weigh else []):
        drawn = torch.rand(layer.keys.shape[:3], generator=torch.Generator().manual_seed(number))
        layer.receive(drawn * (layer.positions >= 0))
    return memory


def plain(model: torch.nn.Module, memory: KVMemory, new: Tensor) -> Tensor:
    """Logits of an ordinary forward."""
    with torch.no_grad():
        logits: Tensor = model(new, past_key_values=memory).logits[:, -1]
    return logits


def both(family: str, attention: str) -> tuple[KVMemory, StaticMemory, StaticStep]:
    """The same memory twice, once static with a step on it."""
    static, step = StaticMemory.of(prefilled(family, attention), CAPACITY), StaticStep()
    step.begin(tiny(family, attention), static)
    return prefilled(family, attention), static, step


def assert_same_rows(ours: StaticMemory | KVMemory, theirs: KVMemory, exact: bool = False) -> None:
    theirs.settle()
    assert torch.equal(ours.next_position, theirs.next_position)
    for own, other in zip(ours.layers, theirs.layers):
        assert torch.equal(own.positions, other.positions)
        filled = (other.positions >= 0)[..., None]
        tolerance = 0.0 if exact else 1e-5
        torch.testing.assert_close(own.keys * filled, other.keys, atol=tolerance, rtol=0)
        torch.testing.assert_close(own.values * filled, other.values, atol=tolerance, rtol=0)
        assert (own.mass is None) == (other.mass is None)
        if own.mass is not None and other.mass is not None:
            torch.testing.assert_close(own.mass * filled[..., 0], other.mass, atol=tolerance, rtol=0)


@pytest.mark.parametrize("weigh", [False, True])
def test_there_and_back_is_bit_equal(weigh: bool) -> None:
    expected, moved = prefilled(weigh=weigh), prefilled(weigh=weigh)
    static = StaticMemory.of(moved, CAPACITY)
    assert moved.bytes == 0
    assert_same_rows(static, expected, exact=True)
    back = static.to_memory()
    assert back is moved
    assert_same_rows(back, expected, exact=True)
    assert back.bytes == expected.bytes
    # The memory lives on.
    model, new = tiny("llama", "sdpa"), tokens(2, 3, seed=5)
    with torch.no_grad():
        ours = model(new, past_key_values=back).logits
        assert torch.equal(ours, model(new, past_key_values=expected).logits)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "opt", "mistral", "gemma3"])
def test_forwards_are_those_of_the_memory(family: str, attention: str) -> None:
    """Padding, heads with different rows, a window (mistral and gemma3 look back 5 positions), rows that go between."""
    dynamic, static, step = both(family, attention)
    heads = static.layers[0].keys.shape[1]
    for number in range(8):
        new = tokens(2, 1, seed=10 + number)
        ours, theirs = step(new), plain(tiny(family, attention), dynamic, new)
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
        dynamic.settle()
        if number == 2:
            last = torch.arange(dynamic.layers[0].length - 6, dynamic.layers[0].length).expand(2, heads, -1)
            for memory in (dynamic, static):
                memory.keep(0, last)
        if number == 4:
            # Only the second row, and out of order.
            some = torch.tensor([-1, 5, 3, dynamic.layers[1].length - 1]).expand(1, heads, -1)
            for memory in (dynamic, static):
                memory.evict(1, torch.tensor([1]), some)
        assert_same_rows(static, dynamic)
        assert torch.equal(static.tokens, dynamic.tokens)
    assert static.layers[0].length != static.layers[1].length
    assert_same_rows(static.to_memory(), dynamic)


def test_traced_code_sees_heads_with_different_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    model, dynamic = tiny("llama", "sdpa"), prefilled()
    static, step = StaticMemory.of(prefilled(), CAPACITY), StaticStep("compile")
    step.begin(model, static)
    # Some queries see much less than others.
    few = torch.full((2, 2, 9), -1)
    few[:, 0, -2:], few[:, 1, 1:] = torch.tensor([7, 8]), torch.arange(1, 9)
    for memory in (dynamic, static):
        memory.keep(0, few)
    for number in range(3):
        new = tokens(2, 1, seed=number)
        torch.testing.assert_close(step(new), plain(model, dynamic, new), atol=1e-5, rtol=0)


def test_addresses_shapes_and_bytes_never_change() -> None:
    memory = prefilled(weigh=True)
    static, step = StaticMemory.of(memory, [CAPACITY, 17]), StaticStep()
    step.begin(tiny("llama", "sdpa"), static)
    rows, heads, width = 2, 2, 8

    def held() -> list[tuple[int, torch.Size]]:
        return [(part.data_ptr(), part.shape) for layer in static.layers for part in layer.tensors()]

    before = held()
    # Keys and values in float32, positions in int32, mass in float32.
    assert static.bytes == rows * heads * (CAPACITY + 17) * (2 * width * 4 + 4 + 4)
    for number in range(5):
        step(tokens(2, 1, seed=number))
    static.keep(0, torch.arange(3, 9).expand(2, 2, -1))
    static.evict(1, torch.tensor([0]), torch.arange(10, 14).expand(1, 2, -1))
    static.retire(torch.tensor([0]))
    step(tokens(2, 1))
    assert held() == before
    assert static.bytes == storage_bytes(part for layer in static.layers for part in layer.tensors())
    assert static.bytes == rows * heads * (CAPACITY + 17) * (2 * width * 4 + 4 + 4)


def test_a_retired_row_leaves_nothing_and_changes_nothing() -> None:
    dynamic, static, step = both("llama", "sdpa")
    new = tokens(2, 1, seed=3)
    step(new)
    plain(tiny("llama", "sdpa"), dynamic, new)
    static.retire(torch.tensor([1]))
    dynamic.batch_select_indices(torch.tensor([0]))
    # The longer row has gone, and its slots with it.
    assert static.layers[0].length == 6
    for number in range(4):
        new = tokens(2, 1, seed=4 + number)
        ours = step(new)
        assert not ours.isnan().any()
        torch.testing.assert_close(ours[:1], plain(tiny("llama", "sdpa"), dynamic, new[:1]), atol=1e-5, rtol=0)
    assert static.tokens.tolist() == [10.0, 0.0]
    back = static.to_memory()
    back.batch_select_indices(torch.tensor([0]))
    assert_same_rows(back, dynamic)


def test_new_rows_begin_without_attention() -> None:
    """A slot that is used again must not remember what the row before it received."""
    memory = prefilled(weigh=True)
    static, step = StaticMemory.of(memory, CAPACITY), StaticStep()
    step.begin(tiny("llama", "sdpa"), static)
    static.layers[0].receive(torch.ones(2, 2, CAPACITY))
    static.keep(0, torch.arange(5, 9).expand(2, 2, -1))
    step(tokens(2, 1))
    mass = static.layers[0].mass
    assert mass is not None
    assert mass[..., -1].eq(0).all()
    assert mass[..., :-1].gt(0).all()


def test_what_does_not_fit_is_refused() -> None:
    coded = KVMemory(tiny("llama", "sdpa"), storage="int8")
    plain(tiny("llama", "sdpa"), coded, tokens(1, 4))
    with pytest.raises(UserError, match=r"storage: .* int8"):
        StaticMemory.of(coded, CAPACITY)
    with pytest.raises(ValueError, match="no next position"):
        StaticMemory.of(KVMemory(tiny("llama", "sdpa")), CAPACITY)
    memory = prefilled()
    with pytest.raises(ValueError, match="8 slots do not hold the 9"):
        StaticMemory.of(memory, 8)
    assert memory.layers[0].length == 9
    static, step = StaticMemory.of(memory, 10), StaticStep()
    step.begin(tiny("llama", "sdpa"), static)
    step(tokens(2, 1))
    with pytest.raises(ValueError, match="10 slots of layer 0 are full"):
        step(tokens(2, 1))
    with pytest.raises(ValueError, match="one token for each"), torch.no_grad():
        tiny("llama", "sdpa")(tokens(2, 2), past_key_values=static)
