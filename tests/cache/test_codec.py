"""Coded storage: really smaller, never further off than half a step, the same however the text is fed."""

import pytest
import torch
from kv_models import tiny, tokens

from kvc.cache.codec import Affine, Storage, codec_of
from kvc.cache.memory import KVMemory
from kvc.errors import UserError


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("storage", "levels"), [("int8", 255), ("int4", 15)])
def test_error_is_at_most_half_a_step(storage: Storage, levels: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(2, 3, 50, 128, generator=generator) * torch.logspace(-3, 3, 50)[:, None] + 5
    rows = rows.to(dtype)
    codec = Affine(storage, 64)
    parts = codec.encode(rows)
    groups = rows.float().reshape(2, 3, 50, 2, 64)
    span = groups.amax(-1) - groups.amin(-1)
    size = groups.abs().amax(-1)
    step = parts[1].float()
    # The step is that of the group's range, but for the rounding of its two numbers.
    assert (step >= span / levels * 0.999).all()
    assert (step <= (span + size * 2**-7) / levels * 1.02 + 1e-6).all()
    error = (codec.decode(parts, torch.float32).reshape_as(groups) - groups).abs()
    assert (error <= step[..., None] / 2 * 1.001 + size[..., None] * 1e-6).all()


@pytest.mark.parametrize("storage", ["int8", "int4"])
def test_empty_slots_and_equal_channels_are_exact(storage: Storage) -> None:
    codec = codec_of(storage)
    rows = torch.zeros(1, 1, 3, 8)
    rows[0, 0, 1] = 2.5
    assert torch.equal(codec.decode(codec.encode(rows), torch.float32), rows)


@pytest.mark.parametrize(("storage", "share"), [("int8", (128 + 2 * 4) / 256), ("int4", (64 + 2 * 4) / 256)])
def test_bytes_are_really_smaller(storage: Storage, share: float) -> None:
    model = tiny("llama")
    plain, coded = KVMemory(model), KVMemory(model, storage)
    for memory in (plain, coded):
        for layer in range(2):
            rows = torch.randn(1, 2, 100, 128, dtype=torch.bfloat16)
            memory.append(layer, rows, rows.clone(), torch.arange(100)[None])
    positions = 2 * 100 * 4
    assert plain.bytes - positions == 2 * 2 * 2 * 100 * 256
    assert coded.bytes - positions == 2 * 2 * 2 * 100 * 256 * share


@torch.no_grad()
@pytest.mark.parametrize("storage", ["int8", "int4"])
def test_feeding_in_pieces_gives_the_same_codes_and_logits(storage: Storage) -> None:
    model, ids = tiny("llama"), tokens(1, 12)
    whole, pieces = KVMemory(model, storage), KVMemory(model, storage)
    logits = model(ids, past_key_values=whole).logits
    parts = [model(part, **pieces.forward_kwargs(part)).logits for part in ids.split([5, 1, 6], dim=1)]
    assert torch.allclose(torch.cat(parts, dim=1), logits, atol=1e-5)
    assert torch.equal(whole.layers[0].rows[0][0], pieces.layers[0].rows[0][0])


@torch.no_grad()
def test_eight_bits_are_close_and_four_are_less_so() -> None:
    model, ids = tiny("llama"), tokens(1, 12)
    plain = model(ids).logits
    off = {
        s: float((model(ids, past_key_values=KVMemory(model, s)).logits - plain).abs().mean()) for s in ("int8", "int4")
    }
    assert 0 < off["int8"] < off["int4"] / 4
    assert off["int8"] < 0.01 * float(plain.abs().mean())


@torch.no_grad()
def test_dropping_and_moving_coded_rows() -> None:
    model, ids = tiny("llama"), tokens(1, 10)
    coded, plain = KVMemory(model, "int8"), KVMemory(model)
    model(ids, past_key_values=coded)
    for index, layer in enumerate(coded.layers):
        plain.append(index, layer.keys, layer.values, layer.positions)
    for memory in (coded, plain):
        for layer in range(2):
            memory.keep(layer, torch.tensor([[[0, 3, 9], [-1, 2, 5]]]))
    assert torch.equal(coded.layers[1].keys, plain.layers[1].keys)
    for memory in (coded, plain):
        memory.rotate("place", target_end=30)
    assert torch.equal(coded.layers[1].positions, plain.layers[1].positions)
    assert torch.allclose(coded.layers[1].keys, plain.layers[1].keys, atol=0.02)
    assert torch.equal(coded.layers[1].values, plain.layers[1].values)


def test_bad_storage_is_said() -> None:
    with pytest.raises(UserError, match="not one of full, int8, int4"):
        KVMemory(tiny("llama"), "int3")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="positive even"):
        KVMemory(tiny("llama"), "int4", group=7)
