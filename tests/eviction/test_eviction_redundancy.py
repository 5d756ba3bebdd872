"""Redundancy found tile by tile equals the literal form, in memory linear in the number of keys."""

from typing import Any

import pytest
import torch
import views
from literal import literal_redundancy
from torch.utils._python_dispatch import TorchDispatchMode

from kvc.eviction import redundancy as module
from kvc.eviction import similar
from kvc.eviction.redundancy import redundancy

DIRECTIONS = ["last", "first", "last_percent", "first_percent"]


@pytest.fixture(params=[7, 32, 512])
def tile(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Edge of a tile: smaller than, a divisor of and larger than the lengths tested."""
    for part in (similar, module):
        monkeypatch.setattr(part, "tile_size", lambda device: request.param)
    return request.param


@pytest.mark.parametrize("kind", ["gauss", "clustered"])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(("length", "width"), [(1, 4), (2, 4), (64, 8), (131, 16)])
def test_equals_the_literal_form(tile: int, kind: str, direction: str, length: int, width: int) -> None:
    keys = views.keys_like(kind, (2, 3, length, width), seed=length).double()
    for ratio in (0.01, 0.5, 0.9) if "percent" in direction else (0.1,):
        literal = literal_redundancy(keys, direction, ratio)
        torch.testing.assert_close(redundancy(keys, direction, ratio, rounded=True), literal, rtol=1e-12, atol=0)
        torch.testing.assert_close(redundancy(keys, direction, ratio), literal.float(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", ["gauss", "clustered", "ragged"])
@pytest.mark.parametrize("seed", range(8))
def test_last_similar_finds_what_a_matrix_shows(tile: int, kind: str, seed: int) -> None:
    """Ragged: heads of one batch have their similar keys at different places, so their open rows differ in number."""
    length = 40 + 13 * seed
    if kind == "ragged":
        parts = [views.keys_like(k, (1, 1, length, 12), seed) for k in ("gauss", "clustered")]
        few = parts[0].clone()
        few[0, 0, 3 * seed] = few[0, 0, -1 - seed]
        keys = torch.cat([*parts, few], 1)[0]
    else:
        keys = views.keys_like(kind, (1, 3, length, 12), seed)[0]
    unit = keys / keys.norm(dim=-1, keepdim=True)
    cosine = unit @ unit.transpose(-1, -2)
    cosine.diagonal(dim1=-2, dim2=-1).zero_()
    expected = torch.where(cosine > 0.5, torch.arange(length), 0).amax(-1)
    assert torch.equal(similar.last_similar(unit, 0.5), expected)


def test_half_precision_follows_the_roundings_of_the_original(tile: int) -> None:
    keys = views.keys_like("clustered", (2, 2, 130, 16), 1).bfloat16()
    rounded = redundancy(keys, rounded=True)
    assert rounded.dtype == torch.bfloat16
    assert (rounded != literal_redundancy(keys)).float().mean() <= 0.01
    plain = redundancy(keys)
    assert plain.dtype == torch.float32
    torch.testing.assert_close(plain, literal_redundancy(keys.float()), rtol=1e-5, atol=0)


def test_a_projection_comes_close() -> None:
    keys = views.keys_like("clustered", (1, 2, 300, 64), 2)
    exact, near = redundancy(keys), redundancy(keys, projection=48)
    assert not torch.equal(exact, near)
    assert torch.equal(near, redundancy(keys, projection=48)), "the projection is the same every time"
    assert torch.corrcoef(torch.stack([exact.flatten(), near.flatten()]))[0, 1] > 0.8


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


@pytest.mark.parametrize("kind", ["gauss", "clustered"])
@pytest.mark.parametrize(
    ("direction", "dtype", "options"),
    [
        ("last", torch.float32, {}),
        ("last", torch.float32, {"projection": 8}),
        ("first_percent", torch.float32, {"ratio": 0.9}),
        ("last", torch.bfloat16, {"rounded": True}),
    ],
)
def test_memory_grows_linearly(
    monkeypatch: pytest.MonkeyPatch, kind: str, direction: Any, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    for part in (similar, module):
        monkeypatch.setattr(part, "tile_size", lambda device: 16)
    sizes = []
    for length in (200, 400):
        keys = views.keys_like(kind, (1, 2, length, 16), 0).to(dtype)
        with Largest() as largest:
            redundancy(keys, direction, **options)
        sizes.append(largest.elements)
        assert largest.elements <= 2 * length * 32, "less than a stripe of 32 columns per head"
    assert sizes[1] <= 2.1 * sizes[0]
