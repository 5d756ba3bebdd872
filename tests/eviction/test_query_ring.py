"""The ring of queries holds the newest ones in order of time, however they came."""

import pytest
import torch

from kvc.eviction.recorder import Ring

WINDOW = 4


def queries(count: int, start: int = 0, batch: int = 2) -> torch.Tensor:
    """`[B, 1, T, 1]`, numbered by time."""
    return torch.arange(start, start + count, dtype=torch.float32)[:, None].expand(batch, 1, -1, -1).clone()


@pytest.mark.parametrize("pieces", [[1] * 9, [2] + [1] * 6, [6, 1, 1, 1], [3, 1, 3, 1, 1], [4, 5], [9]], ids=str)
def test_the_newest_in_order(pieces: list[int]) -> None:
    ring, seen = Ring(WINDOW), 0
    assert ring.ordered() is None
    for count in pieces:
        ring.push(queries(count, seen))
        seen += count
        ordered = ring.ordered()
        assert ordered is not None
        assert ordered[1, 0, :, 0].tolist() == list(range(max(0, seen - WINDOW), seen))


def test_padding_pushes_nothing_out() -> None:
    ring = Ring(WINDOW)
    ring.push(queries(3))
    ring.push(queries(2, 3), torch.tensor([[True, True], [False, True]]))
    ring.push(queries(1, 5))
    ordered = ring.ordered()
    assert ordered is not None
    assert ordered[0, 0, :, 0].tolist() == [2, 3, 4, 5]
    assert ordered[1, 0, :, 0].tolist() == [1, 2, 4, 5]


def test_a_step_writes_in_place() -> None:
    ring = Ring(WINDOW)
    ring.push(queries(2))
    assert ring._buffer is not None
    before = ring._buffer.data_ptr(), ring._pushed.data_ptr()
    for seen in range(2, 11):
        ring.push(queries(1, seen))
    assert (ring._buffer.data_ptr(), ring._pushed.data_ptr()) == before
    ring.select(torch.tensor([1, 1, 0]))
    ordered = ring.ordered()
    assert ordered is not None
    assert ordered[:, 0, :, 0].tolist() == [[7, 8, 9, 10]] * 3
