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


@pytest.mark.parametrize("traced", [False, True])
def test_a_step_writes_in_place(traced: bool) -> None:
    ring = Ring(WINDOW)
    ring.push(queries(2))
    ring.push(queries(1, 2))
    if traced:
        ring.count_on_device()
    assert ring._buffer is not None
    before = [part.data_ptr() for part in (ring._buffer, ring._pushed) if part is not None]
    for seen in range(3, 11):
        ring.push(queries(1, seen))
    assert [part.data_ptr() for part in (ring._buffer, ring._pushed) if part is not None] == before
    assert len(before) == 1 + traced
    ring.select(torch.tensor([1, 1, 0]))
    ordered = ring.ordered()
    assert ordered is not None
    assert ordered[:, 0, :, 0].tolist() == [[7, 8, 9, 10]] * 3


def test_padding_is_counted_until_steps_have_overwritten_it() -> None:
    ring = Ring(WINDOW)
    ring.push(queries(2))
    assert ring.absent() is None
    ring = Ring(WINDOW)
    ring.push(queries(3), torch.tensor([[False, False, True], [True, True, True]]))
    counts = []
    for seen in range(3, 7):
        absent, ordered = ring.absent(), ring.ordered()
        assert absent is not None
        assert ordered is not None
        counts.append(absent.tolist())
        assert ordered[0, 0, counts[-1][0] :, 0].tolist() == list(range(2, seen))[-WINDOW:]
        ring.push(queries(1, seen))
    assert counts == [[2, 0], [2, 0], [1, 0], [0, 0]]
    ring = Ring(WINDOW)
    ring.push(queries(3), torch.tensor([[False, False, True], [True, True, True]]))
    # Padding stays in front of what comes later, and more of it may come.
    ring.push(queries(2, 3), torch.tensor([[False, True], [True, True]]))
    absent, ordered = ring.absent(), ring.ordered()
    assert absent is not None
    assert ordered is not None
    assert absent.tolist() == [2, 0]
    assert ordered[:, 0, :, 0].tolist()[0][2:] == [2, 4]
    assert ordered[1, 0, :, 0].tolist() == [1, 2, 3, 4]
