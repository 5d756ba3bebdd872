"""Bytes are those that are held, and go when rows go."""

import pytest
import torch
from kv_models import left_padded, tiny, tokens
from transformers import DynamicCache

from kvc.cache.accounting import Usage, cache_bytes, storage_bytes
from kvc.cache.memory import KVMemory
from kvc.errors import UserError

ROW = 2 * 8 * 4
"""Bytes of key and value of one token, layer and head of the tiny model."""


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_bytes_shrink_to_the_budget(family: str) -> None:
    """phi3 makes query, key and value in one product, of which a cache must not keep the rest alive."""
    model, ids = tiny(family), tokens(3, 20)
    memory, plain = KVMemory(model), DynamicCache(config=model.config)
    model(ids, past_key_values=memory)
    model(ids, past_key_values=plain)
    # Positions are stored once for all heads until heads differ: 4 bytes a slot.
    assert cache_bytes(plain) == 2 * 3 * 2 * 20 * ROW
    assert cache_bytes(memory) == memory.bytes == 2 * 3 * 20 * (2 * ROW + 4)
    budget = torch.stack([torch.randperm(20)[:7] for _ in range(6)]).reshape(3, 2, 7)
    for layer in range(2):
        memory.keep(layer, budget)
    assert memory.bytes == 2 * 3 * 2 * 7 * (ROW + 4)
    assert memory.tokens.tolist() == [7, 7, 7]


def test_a_view_does_not_keep_its_whole_alive() -> None:
    fused = torch.randn(3, 1, 2, 5, 8)
    memory = KVMemory(tiny("llama"))
    memory.layers[0].append(fused[1], fused[2], torch.arange(5)[None], padded=False)
    assert memory.bytes == 2 * 5 * ROW + 5 * 4


@torch.no_grad()
def test_old_rows_are_freed() -> None:
    import gc
    import weakref

    model = tiny("llama")
    memory = KVMemory(model)
    model(tokens(1, 20), past_key_values=memory)
    old = weakref.ref(memory.layers[0].rows[0][0].untyped_storage())
    held = weakref.ref(memory.layers[0].rows[0][0])
    memory.keep(0, torch.tensor([[[0], [1]]]))
    gc.collect()
    assert held() is None
    assert old() is None


@torch.no_grad()
def test_forks_share_until_they_change() -> None:
    model = tiny("llama")
    memory = KVMemory(model)
    model(tokens(1, 20), past_key_values=memory)
    fork = memory.fork()
    both = [t for m in (memory, fork) for layer in m.layers for t in layer.tensors()]
    assert storage_bytes(both) == memory.bytes
    fork.keep(0, torch.tensor([[[0], [1]]]))
    model(tokens(1, 2), past_key_values=fork)
    assert memory.layers[0].length == memory.layers[1].length == 20
    assert (fork.layers[0].length, fork.layers[1].length) == (3, 22)
    assert memory.next_position.tolist() == [20]


@torch.no_grad()
def test_usage_over_time() -> None:
    model = tiny("llama")
    memory, usage = KVMemory(model), Usage()
    ids, mask = left_padded([tokens(4), tokens(10, seed=1)])
    model(ids, **memory.forward_kwargs(ids, mask))
    usage.record([0, 1], memory.tokens.tolist(), memory.bytes)
    full = memory.bytes
    model(tokens(2, 1), past_key_values=memory)
    usage.record([0, 1], memory.tokens.tolist(), memory.bytes)
    peak = memory.bytes
    memory.keep(0, torch.tensor([[[8, 9, 10], [-1, 9, 10]]]).expand(2, -1, -1))
    memory.keep(1, torch.tensor([[[10], [10]]]).expand(2, -1, -1))
    memory.batch_select_indices(torch.tensor([0]))
    usage.record([0], memory.tokens.tolist(), memory.bytes)
    final = (2.5 + 1) / 2
    summary = usage.summary(0)
    assert summary["kv_tokens_peak"] == 5
    assert summary["kv_tokens_final"] == final
    assert summary["kv_tokens_mean"] == pytest.approx((4 + 5 + final) / 3)
    assert summary["kv_bytes_peak"] == peak / 2
    assert summary["kv_bytes_final"] == memory.bytes
    assert summary["kv_bytes_mean"] == pytest.approx((full / 2 + peak / 2 + memory.bytes) / 3)
    assert usage.summary(1)["kv_tokens_final"] == 11
    assert usage.summary(1)["kv_tokens_mean"] == 10.5
    with pytest.raises(ValueError, match="nothing was recorded"):
        Usage().summary()


def test_models_with_another_kind_of_memory_are_refused() -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "qwen3_next", vocab_size=64, hidden_size=32, num_hidden_layers=4, intermediate_size=32, num_experts=2,
        moe_intermediate_size=16, shared_expert_intermediate_size=16, num_attention_heads=2, num_key_value_heads=2,
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(UserError, match="linear attention, which a KV memory cannot hold"):
        KVMemory(model)
