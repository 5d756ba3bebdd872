"""Compressing chunk by chunk gives what one forward over the whole sequence gives, alone and in a ragged batch."""

from typing import Any

import ccm_tiny as tiny
import pytest
import torch

from kvc.errors import UserError
from kvc.methods.ccm.merging import Ema, Mean
from kvc.methods.ccm.parallel import Compressor
from kvc.methods.ccm.recurrent import CompressedMemory

KINDS = ["concat", "concat_recur", "merge", "merge_recur"]
NEAR: dict[str, Any] = {"atol": 2e-5, "rtol": 1e-4}
COUNTS = [3, 1, 0, 4]


def parallel(compressor: Compressor, rows: list[tiny.Context], left: bool = True) -> list[torch.Tensor]:
    ids, mask, kept = tiny.sequences(rows, compressor.tokens.slots, left)
    output = compressor.hidden(ids, mask, kept)
    return tiny.tails(compressor.logits(output.last_hidden_state), mask, rows)


def stepwise(compressor: Compressor, rows: list[tiny.Context], left: bool = True) -> CompressedMemory:
    memory = CompressedMemory(compressor)
    if any(row.prompt for row in rows):
        memory.keep(*tiny.padded([row.prompt for row in rows], left))
    for step in range(max(len(row.chunks) for row in rows)):
        chunks = [row.chunks[step] if step < len(row.chunks) else [] for row in rows]
        memory.compress(*tiny.padded(chunks, left))
    return memory


def query(memory: CompressedMemory, rows: list[tiny.Context], left: bool = True) -> list[torch.Tensor]:
    ids, mask = tiny.padded([row.tail for row in rows], left)
    return tiny.tails(memory.logits(ids, mask), mask, rows)


def check(compressor: Compressor, rows: list[tiny.Context], left: bool = True) -> CompressedMemory:
    memory = stepwise(compressor, rows, left)
    for found, expected in zip(query(memory, rows, left), parallel(compressor, rows, left), strict=True):
        torch.testing.assert_close(found, expected, **NEAR)
    return memory


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", tiny.FAMILIES)
@torch.no_grad()
def test_steps_equal_one_forward(family: str, kind: Any) -> None:
    check(tiny.compressor(family, kind=kind), tiny.contexts(COUNTS))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("slots", [1, 3])
@pytest.mark.parametrize("positions", ["skip", "base"])
@torch.no_grad()
def test_any_number_of_tokens_and_both_position_rules(kind: Any, slots: int, positions: Any) -> None:
    for seed, left in ((1, True), (2, False)):
        check(tiny.compressor(slots=slots, kind=kind, positions=positions), tiny.contexts(COUNTS, seed), left)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_without_a_prompt_and_without_condition(kind: Any) -> None:
    check(tiny.compressor(kind=kind, conditional=False), tiny.contexts([2, 3], prompt=0))


@pytest.mark.parametrize("kind", ["merge", "merge_recur"])
@torch.no_grad()
def test_moving_average(kind: Any) -> None:
    rows = tiny.contexts(COUNTS)
    compressor = tiny.compressor(kind=kind, merge=Ema(0.3))
    check(compressor, rows)
    mean = tiny.compressor(kind=kind, merge=Mean())
    assert not torch.allclose(parallel(compressor, rows)[0], parallel(mean, rows)[0], atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_row_of_a_batch_is_what_it_is_alone(kind: Any) -> None:
    rows = tiny.contexts(COUNTS)
    compressor = tiny.compressor(kind=kind)
    together, batch = query(stepwise(compressor, rows), rows), parallel(compressor, rows)
    for row, by_steps, at_once in zip(rows, together, batch):
        alone = parallel(compressor, [row])[0]
        torch.testing.assert_close(by_steps, alone, **NEAR)
        torch.testing.assert_close(at_once, alone, **NEAR)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_what_is_held(kind: Any) -> None:
    """Rows, peak and next position of every row of a ragged batch."""
    rows = tiny.contexts(COUNTS)
    memory = check(tiny.compressor(kind=kind), rows)
    runs = [min(len(row.chunks), 1) if kind.startswith("merge") else len(row.chunks) for row in rows]
    held = [len(row.prompt) + 2 * count for row, count in zip(rows, runs)]
    assert memory.steps.tolist() == COUNTS
    for layer in memory.memory.layers:
        assert layer.counts.expand(len(rows), -1)[:, 0].tolist() == held
        assert layer.length == max(held), "slots that nobody needs"
    ordinary = [len(row.prompt) + sum(map(len, row.chunks)) for row in rows]
    assert memory.memory.next_position.tolist() == ordinary
    before = [
        [len(row.prompt) + 2 * (min(step, 1) if kind.startswith("merge") else step) for step in range(len(row.chunks))]
        for row in rows
    ]
    peaks = [max([h + len(c) + 2 for h, c in zip(b, row.chunks)], default=0) for b, row in zip(before, rows)]
    found = memory.peak.tolist()
    assert [max(f, p) for f, p in zip(found, peaks)] == found
    assert [f for f, row in zip(found, rows) if row.chunks] == [p for p, row in zip(peaks, rows) if row.chunks]


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_one_memory_serves_several_continuations(kind: Any) -> None:
    rows = tiny.contexts([2])
    compressor = tiny.compressor(kind=kind)
    memory = stepwise(compressor, rows)
    tails, mask = tiny.padded([[5, 6, 7], [8, 9]])
    both = tiny.tails(memory.logits(tails, mask), mask, [tiny.Context([], [], [5, 6, 7]), tiny.Context([], [], [8, 9])])
    torch.testing.assert_close(both[1], memory.logits(torch.tensor([[8, 9]]))[0], **NEAR)
    memory.compress(*tiny.padded([[5, 6, 7], [8, 9]]))
    assert memory.steps.tolist() == [3, 3]
    other = stepwise(compressor, [tiny.Context(rows[0].prompt, [*rows[0].chunks, [8, 9]], [])])
    torch.testing.assert_close(memory.logits(torch.tensor([[3], [3]]))[1], other.logits(torch.tensor([[3]]))[0], **NEAR)


@pytest.mark.parametrize("conditional", [True, False])
def test_generate_follows_the_logits(conditional: bool) -> None:
    rows = tiny.contexts([2, 3])
    compressor = tiny.compressor(kind="concat_recur", conditional=conditional)
    with torch.no_grad():
        memory = stepwise(compressor, rows)
    ids, mask = tiny.padded([row.tail for row in rows])
    made = memory.generate(ids, 5, mask, do_sample=False, eos_token_id=None)
    for step in range(5):
        size = ids.shape[1] + step
        longer = torch.cat([mask, torch.ones(2, step, dtype=torch.int64)], dim=1)
        with torch.no_grad():
            expected = memory.logits(made[:, :size], longer)[:, -1].argmax(-1)
        assert torch.equal(made[:, size], expected)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_pass_through_the_memory(kind: Any) -> None:
    rows = tiny.contexts(COUNTS)
    compressor = tiny.compressor(kind=kind)
    found = []
    for form in (lambda: query(stepwise(compressor, rows), rows), lambda: parallel(compressor, rows)):
        compressor.tokens.table.grad = None
        sum(logits.logsumexp(-1).sum() for logits in form()).backward()
        found.append(compressor.tokens.table.grad)
    torch.testing.assert_close(found[0], found[1], atol=1e-4, rtol=1e-3)
    assert float(found[1].abs().max()) > 1e-3


def test_kinds_without_a_recurrent_form_are_refused() -> None:
    with pytest.raises(UserError, match="kind: 'gist' cannot compress chunk by chunk"):
        CompressedMemory(tiny.compressor(kind="gist"))


@torch.no_grad()
def test_kernels_of_the_parallel_form_alone_are_refused() -> None:
    with pytest.raises(UserError, match="attn_implementation: flex_attention is for the parallel form"):
        CompressedMemory(tiny.compressor(kind="concat_recur", attention="flex_attention"))


def test_a_prompt_comes_first() -> None:
    memory = stepwise(tiny.compressor(), tiny.contexts([1]))
    with pytest.raises(ValueError, match="before the first chunk"):
        memory.keep(torch.tensor([[5]]))
