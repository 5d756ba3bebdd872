"""Any sequence of operations gives what a simple model made of lists gives: positions exactly, rows to the bit."""

import random

import pytest
import torch
from kv_models import tiny

from kvc.cache.memory import KVMemory

HEADS, SIZE, BATCH = 2, 8, 3
Row = tuple[int, torch.Tensor, torch.Tensor]


class Lists:
    """For each layer, row of the batch and head, a list of (position, key, value)."""

    def __init__(self, layers: int) -> None:
        self.rows: list[list[list[list[Row]]]] = [
            [[[] for _ in range(HEADS)] for _ in range(BATCH)] for _ in range(layers)
        ]
        self.next = [0] * BATCH

    def slots(self, layer: int) -> int:
        return max(len(head) for row in self.rows[layer] for head in row)

    def padded(self, layer: int, b: int, h: int) -> list[Row | None]:
        row = self.rows[layer][b][h]
        return [None] * (self.slots(layer) - len(row)) + row

    def set_all(self, layer: int, slots: "dict[tuple[int, int], list[Row | None]]") -> None:
        for (b, h), rows in slots.items():
            self.rows[layer][b][h] = [row for row in rows if row is not None]


def turned(key: torch.Tensor, delta: int) -> torch.Tensor:
    """A key moved by `delta` positions, by complex multiplication in double."""
    pairs = torch.complex(key[: SIZE // 2].double(), key[SIZE // 2 :].double())
    angle = delta / 10000.0 ** (torch.arange(0, SIZE, 2, dtype=torch.float64) / SIZE)
    pairs = pairs * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([pairs.real, pairs.imag]).float()


def new_rows(
    rng: random.Random, lists: Lists, size: int, padded: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    keys, values = torch.randn(BATCH, HEADS, size, SIZE), torch.randn(BATCH, HEADS, size, SIZE)
    positions = torch.tensor([[lists.next[b] + i for i in range(size)] for b in range(BATCH)])
    if padded:
        for b in range(BATCH):
            gone = rng.randrange(size)
            positions[b, :gone] = -1
            positions[b, gone:] = torch.arange(size - gone) + lists.next[b]
    return keys, values, positions


def fresh(tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor], b: int, h: int) -> list[Row | None]:
    keys, values, positions = tensors
    return [
        None if positions[b, i] < 0 else (int(positions[b, i]), keys[b, h, i], values[b, h, i])
        for i in range(positions.shape[1])
    ]


def step(rng: random.Random, memory: KVMemory, lists: Lists) -> str:
    layers = len(memory.layers)
    layer = rng.randrange(layers)
    size = lists.slots(layer)
    every = [(b, h) for b in range(BATCH) for h in range(HEADS)]
    operation = rng.choice(
        ["append", "append", "append padded", "keep", "replace", "merge", "compact", "place", "crop", "select"]
    )
    if size < 4 or operation.startswith("append"):
        # In all layers, as a forward does.
        new = new_rows(rng, lists, rng.randint(1, 5), operation == "append padded")
        for index in range(layers):
            memory.append(index, *new)
            for b, h in every:
                lists.rows[index][b][h] += [row for row in fresh(new, b, h) if row is not None]
        for b in range(BATCH):
            lists.next[b] = max(lists.next[b], int(new[2][b].max()) + 1)
    elif operation == "keep":
        width = rng.randint(2, size)
        indices, kept = torch.full((BATCH, HEADS, width), -1), {}
        for b, h in every:
            count = rng.randint(1, width)
            chosen = rng.sample(range(size), count) + [-1] * (width - count)
            rng.shuffle(chosen)
            indices[b, h] = torch.tensor(chosen)
            slots = lists.padded(layer, b, h)
            kept[b, h] = [slots[i] for i in chosen if i >= 0]
        lists.set_all(layer, kept)
        memory.keep(layer, indices)
    elif operation == "replace":
        start = rng.randrange(size)
        stop = rng.randint(start, size)
        new = new_rows(rng, lists, rng.randint(1, 3), rng.random() < 0.5)
        spliced = {(b, h): (old := lists.padded(layer, b, h))[:start] + fresh(new, b, h) + old[stop:] for b, h in every}
        lists.set_all(layer, spliced)
        for b in range(BATCH):
            lists.next[b] = max(lists.next[b], int(new[2][b].max()) + 1)
        memory.replace(layer, (start - size, stop) if rng.random() < 0.5 else (start, stop), *new)
    elif operation == "merge":
        width = rng.randint(1, size // 3)
        blocks = rng.randint(1, size // width - 1)
        first = rng.randint(0, size - width * (blocks + 1))
        target_left = rng.random() < 0.5
        target = (first, first + width) if target_left else (first + width * blocks, first + width * (blocks + 1))
        source = (first + width, first + width * (blocks + 1)) if target_left else (first, first + width * blocks)
        weight = rng.random()
        merged = {}
        for b, h in every:
            slots = lists.padded(layer, b, h)
            for i in range(width):
                group = [r for k in range(blocks) if (r := slots[source[0] + k * width + i]) is not None]
                if not group:
                    continue
                old = slots[target[0] + i]
                mean = [torch.stack([r[j] for r in group]).mean(0) for j in (1, 2)]
                if old is None:
                    last = slots[source[1] - width + i]
                    assert last is not None
                    slots[target[0] + i] = (last[0], mean[0], mean[1])
                else:
                    both = [(1 - weight) * old[j] + weight * mean[j - 1] for j in (1, 2)]
                    slots[target[0] + i] = (old[0], both[0], both[1])
            merged[b, h] = [row for i, row in enumerate(slots) if not source[0] <= i < source[1]]
        lists.set_all(layer, merged)
        memory.merge(layer, source, target, weight)
    elif operation in {"compact", "place"}:
        prefix = rng.randint(0, 3)
        most = max(sum(r[0] >= prefix for r in lists.rows[k][b][h]) for k in range(layers) for b, h in every)
        end = prefix + most + rng.randint(0, 9)
        lists.next = [end] * BATCH if operation == "place" else [0] * BATCH
        for index in range(layers):
            for b, h in every:
                rows = sorted(lists.rows[index][b][h], key=lambda row: row[0])
                still = [r for r in rows if r[0] < prefix]
                moved = rows[len(still) :]
                start = end - len(moved) if operation == "place" else prefix
                moved = [(start + i, turned(k, start + i - p), v) for i, (p, k, v) in enumerate(moved)]
                lists.rows[index][b][h] = still + moved
                if operation == "compact":
                    lists.next[b] = max([lists.next[b], *(r[0] + 1 for r in still + moved)])
        memory.rotate(operation, prefix, end if operation == "place" else None)  # type: ignore[arg-type]
    elif operation == "crop":
        if min(lists.slots(k) for k in range(layers)) < 3 or min(lists.next) < 1:
            return "nothing"
        for index in range(layers):
            lists.set_all(index, {(b, h): lists.padded(index, b, h)[:-1] for b, h in every})
        lists.next = [n - 1 for n in lists.next]
        memory.crop(-1)
    else:
        order = [rng.randrange(BATCH) for _ in range(BATCH)]
        lists.rows = [[[list(head) for head in rows[b]] for b in order] for rows in lists.rows]
        lists.next = [lists.next[b] for b in order]
        memory.batch_select_indices(torch.tensor(order))
    return operation


@pytest.mark.parametrize("seed", range(12))
def test_operations_in_any_order(seed: int) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    memory, lists, fork, done = KVMemory(tiny("llama")), Lists(2), None, []
    for turn in range(40):
        done.append(step(rng, memory, lists))
        check(memory, lists, done)
        if turn == 20:
            fork, before = memory.fork(), [layer.keys.clone() for layer in memory.layers]
    assert fork is not None
    assert all(torch.equal(layer.keys, keys) for layer, keys in zip(fork.layers, before))


def check(memory: KVMemory, lists: Lists, done: list[str]) -> None:
    assert memory.next_position.tolist() == lists.next, done
    counts = torch.zeros(BATCH)
    for index, layer in enumerate(memory.layers):
        assert layer.length == layer.positions.shape[2] == layer.keys.shape[2] == lists.slots(index), done
        for b in range(BATCH):
            for h in range(HEADS):
                slots = lists.padded(index, b, h)
                assert layer.positions[b, h].tolist() == [-1 if r is None else r[0] for r in slots], done
                zero = torch.zeros(SIZE)
                for j, ours in ((1, layer.keys), (2, layer.values)):
                    theirs = torch.stack([zero if r is None else r[j] for r in slots]) if slots else ours[b, h]
                    assert torch.allclose(ours[b, h], theirs, atol=1e-5), done
                counts[b] += sum(r is not None for r in slots) / HEADS / len(memory.layers)
    assert torch.allclose(memory.tokens, counts), done


def test_rows_that_do_not_move_keep_their_bits() -> None:
    memory = KVMemory(tiny("llama"))
    keys, values = torch.randn(2, 2, 6, 8), torch.randn(2, 2, 6, 8)
    memory.append(0, keys, values, torch.arange(6).expand(2, -1))
    memory.append(1, keys, values, torch.arange(6).expand(2, -1))
    memory.keep(0, torch.tensor([[[5, 1], [2, 3]]]).expand(2, -1, -1))
    assert torch.equal(memory.layers[0].keys[:, 0], keys[:, 0][:, [5, 1]])
    assert torch.equal(memory.layers[0].values[:, 1], values[:, 1][:, [2, 3]])
    memory.rotate("compact", prefix=4)
    assert torch.equal(memory.layers[1].keys[:, :, :4], keys[:, :, :4])
    assert memory.layers[0].positions[0].tolist() == [[1, 4], [2, 3]]
    assert torch.equal(memory.layers[1].keys, keys)


def test_one_memory_behind_another() -> None:
    model = tiny("llama")
    first, second = KVMemory(model), KVMemory(model)
    for memory, rows, start in ((first, 4, 0), (second, 3, 9)):
        for layer in range(2):
            memory.append(layer, *torch.randn(2, 1, 2, rows, 8), torch.arange(start, start + rows)[None])
    first.keep(0, torch.tensor([[[0, -1], [1, 2]]]))
    expected = torch.cat([first.layers[1].keys, second.layers[1].keys], dim=2)
    first.extend(second)
    assert torch.equal(first.layers[1].keys, expected)
    assert first.layers[0].positions[0].tolist() == [[-1, 0, 9, 10, 11], [1, 2, 9, 10, 11]]
    assert first.next_position.tolist() == [12]
    coded = KVMemory(model, "int8")
    coded.extend(second)
    assert coded.layers[0].length == 3
    again = KVMemory(model, "int8")
    again.extend(coded)
    assert torch.equal(again.layers[0].keys, coded.layers[0].keys)


def test_rows_of_another_memory_bring_the_attention_they_received() -> None:
    model = tiny("llama")
    first, second = KVMemory(model), KVMemory(model)
    for memory, rows in ((first, 4), (second, 3)):
        layer = memory.layers[0]
        layer.weigh()
        layer.append(*torch.randn(2, 1, 2, rows, 8), torch.arange(rows)[None])
        layer.receive(torch.full((1, 2, rows), float(rows)))
    second.layers[0].keep(torch.tensor([[[0, -1], [1, 2]]]))
    first.layers[0].extend(second.layers[0])
    mass = first.layers[0].mass
    assert mass is not None
    assert mass[0].tolist() == [[0, 4, 4, 4, 4, 3], [4, 4, 4, 4, 3, 3]]


def test_ranges_that_do_not_fit() -> None:
    memory = KVMemory(tiny("llama"))
    memory.append(0, *torch.randn(2, 1, 2, 6, 8), torch.arange(6)[None])
    with pytest.raises(ValueError, match="overlap"):
        memory.merge(0, (1, 3), (2, 3), 0.5)
    with pytest.raises(ValueError, match="cannot be averaged"):
        memory.merge(0, (0, 3), (3, 5), 0.5)
    with pytest.raises(ValueError, match="not a range"):
        memory.merge(0, (4, 7), (0, 1), 0.5)
    with pytest.raises(ValueError, match="does not fit a batch"):
        memory.next_position = torch.tensor([1, 2])


def test_a_running_mean_of_compressed_turns() -> None:
    """CCM-merge: two slots of memory, the t-th turn enters with weight 1 / t."""
    memory = KVMemory(tiny("llama"))
    turns = torch.randn(4, 2, 1, 2, 2, 8)
    for t, (keys, values) in enumerate(turns, start=1):
        memory.append(0, keys, values, torch.tensor([[5, 6]]))
        if t > 1:
            memory.merge(0, (-2, None), (0, 2), 1 / t)
    assert memory.layers[0].length == 2
    assert torch.allclose(memory.layers[0].keys, turns[:, 0].mean(0), atol=1e-6)
    assert torch.allclose(memory.layers[0].values, turns[:, 1].mean(0), atol=1e-6)
