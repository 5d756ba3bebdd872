"""Reading with gist tokens: the mask in one forward and the rows that are kept say the same, whatever the batch."""

from typing import Any

import pytest
import torch
from torch.nn.attention.flex_attention import create_mask

from kvc.core.backbone import Backbone, decoder
from kvc.core.masks import visibility
from kvc.errors import UserError
from kvc.methods.gist import FixedGists, GistRatio
from kvc.methods.gist.reading import GistReader, GistToken
from kvc.methods.gist.sequence import ANSWER, CONTEXT, GIST, HEAD, TAIL, sequence

HEADS, CONTEXTS, TAILS, ANSWERS = (3, 1, 2), (9, 4, 6), (2, 4, 3), (2, 3, 1)
COUNTS = torch.tensor([2, 3, 0])
PROMPT, WHOLE = (HEAD, CONTEXT, GIST), (HEAD, CONTEXT, GIST, TAIL, ANSWER)


def part(sizes: tuple[int, ...], seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded; padding holds ordinary ids, so that a leak shows."""
    ids = torch.randint(3, 1500, (len(sizes), max(sizes)), generator=torch.Generator().manual_seed(seed))
    return ids, torch.arange(max(sizes)) < torch.tensor(sizes)[:, None]


def batch(rows: Any = slice(None)) -> dict[str, torch.Tensor]:
    made = {}
    for seed, (name, sizes) in enumerate(
        {"head": HEADS, "context": CONTEXTS, "tail": TAILS, "answer": ANSWERS}.items()
    ):
        ids, mask = part(sizes, seed)
        made |= {f"{name}_ids": ids[rows], f"{name}_mask": mask[rows]}
    return made


def reader(folder: Any, control: Any = "gist", keep_head: bool = False, **settings: Any) -> GistReader:
    model = Backbone(pretrained=str(folder), **settings).load().eval()
    token = GistToken(model.get_input_embeddings())
    token.vector.data += torch.randn(token.vector.shape, generator=torch.Generator().manual_seed(9)) * 0.3
    return GistReader(model, token, control, keep_head)


def after(read: GistReader, made: dict[str, torch.Tensor], counts: torch.Tensor) -> list[torch.Tensor]:
    """Final states behind the gist tokens of each row, from one masked forward."""
    whole = sequence(made, counts)
    hidden = read.hidden(whole)
    return [states[part >= TAIL] for states, part in zip(hidden, whole.part)]


def sliced(read: GistReader, made: dict[str, torch.Tensor], counts: torch.Tensor) -> list[torch.Tensor]:
    """The same, read on top of the memory."""
    memory = read.compress(sequence(made, counts, PROMPT, left=True))
    rest = sequence(made, counts, (TAIL, ANSWER), left=True)
    inputs = memory.forward_kwargs(rest.input_ids, rest.valid.long())
    hidden = decoder(read.model)(input_ids=rest.input_ids, **inputs, use_cache=True).last_hidden_state
    return [states[valid] for states, valid in zip(hidden, rest.valid)]


def close(one: list[torch.Tensor], other: list[torch.Tensor], tolerance: float = 1e-5) -> bool:
    return all(a.shape == b.shape and float((a - b).abs().max()) <= tolerance for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("keep_head", [False, True])
@pytest.mark.parametrize("control", ["gist", "pos_control", "neg_control"])
@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@torch.no_grad()
def test_rows_that_are_kept_say_what_the_mask_says(
    tiny_folder: Any, control: str, keep_head: bool, kernel: str
) -> None:
    read = reader(tiny_folder, control, keep_head, attn_implementation=kernel)
    masked = after(read, batch(), COUNTS)
    assert close(masked, sliced(read, batch(), COUNTS))
    for row in range(3):
        alone, counts = batch(slice(row, row + 1)), COUNTS[row : row + 1]
        assert close(masked[row : row + 1], after(read, alone, counts))
        assert close(masked[row : row + 1], sliced(read, alone, counts))


@pytest.mark.parametrize("keep_head", [False, True])
@torch.no_grad()
def test_the_memory_holds_gist_rows_at_their_positions(tiny_folder: Any, keep_head: bool) -> None:
    memory = reader(tiny_folder, keep_head=keep_head).compress(sequence(batch(), COUNTS, PROMPT, left=True))
    assert memory.next_position.tolist() == [14, 8, 8]
    heads = [[0, 1, 2], [0]] if keep_head else [[], []]
    wanted = [[*heads[0], 12, 13], [*heads[1], 5, 6, 7], list(range(8))]
    for layer in memory.layers:
        for row, positions in enumerate(wanted):
            found = layer.positions[row]
            assert all([p for p in head.tolist() if p >= 0] == positions for head in found)
    rows = max(map(len, wanted))
    assert memory.layers[0].keys.shape[2] == rows
    assert memory.tokens.tolist() == [len(row) for row in wanted]


@pytest.mark.parametrize("control", ["gist", "neg_control"])
def test_the_mask_is_that_of_the_paper(control: Any) -> None:
    whole = sequence(batch(), COUNTS)
    seen = visibility(whole.layout(keep_head=False), control)
    dense = seen.dense()[:, 0]
    for row in range(3):
        size = int(whole.valid[row].sum())
        places = whole.gist[row].nonzero().flatten().tolist()
        for i in range(size):
            for j in range(size):
                allowed = j <= i
                if places:
                    first, last = places[0], places[-1]
                    low = first if control == "gist" else last + 1
                    allowed = allowed and (j <= last if i <= last else j >= low)
                assert bool(dense[row, i, j]) == allowed, (row, i, j)
    block: Any = seen.block()
    assert torch.equal(create_mask(block.mask_mod, 3, 1, *dense.shape[1:], device="cpu")[:, 0], dense)


@pytest.mark.parametrize(("control", "layers"), [("gist", 1), ("neg_control", 2)])
@torch.no_grad()
def test_text_before_the_gists_is_out_of_sight(tiny_folder: Any, control: Any, layers: int) -> None:
    """In one layer the rows of gist tokens cannot know the text, so it can only get past them if the mask leaks."""
    torch.manual_seed(3)
    shape = {"from_config": True, "overrides": {"num_hidden_layers": layers}}
    read = reader(tiny_folder, control, **shape)
    counts = torch.tensor([2, 3, 1])
    one, other = batch(), batch()
    for name in ("context_ids", "head_ids"):
        other[name] = (other[name] + 7) % 1500
    assert all(torch.equal(a, b) for a, b in zip(after(read, one, counts), after(read, other, counts)))
    read.control = "pos_control"
    assert not any(torch.equal(a, b) for a, b in zip(after(read, one, counts), after(read, other, counts)))


@torch.no_grad()
def test_deeper_gist_rows_know_the_text(tiny_folder: Any) -> None:
    read = reader(tiny_folder)
    counts = torch.tensor([2, 3, 1])
    one, other = batch(), batch()
    other["context_ids"] = (other["context_ids"] + 7) % 1500
    assert not close(after(read, one, counts), after(read, other, counts), 1e-3)


@pytest.mark.parametrize("keep_head", [False, True])
@torch.no_grad()
def test_without_gists_it_is_the_plain_model(tiny_folder: Any, keep_head: bool) -> None:
    read = reader(tiny_folder, keep_head=keep_head)
    zero = torch.zeros_like(COUNTS)
    made = batch()
    found = after(read, made, zero)
    for row in range(3):
        parts = [made[f"{name}_ids"][row][made[f"{name}_mask"][row]] for name in ("head", "context", "tail", "answer")]
        states = decoder(read.model)(torch.cat(parts)[None]).last_hidden_state[0]
        rest = TAILS[row] + ANSWERS[row]
        assert close([states[-rest:]], found[row : row + 1])
    assert close(found, sliced(read, made, zero))
    memory = read.compress(sequence(made, zero, PROMPT, left=True))
    assert memory.tokens.tolist() == [h + c for h, c in zip(HEADS, CONTEXTS)]


@torch.no_grad()
def test_the_positive_control_only_adds_tokens(tiny_folder: Any) -> None:
    read = reader(tiny_folder, "pos_control")
    whole = sequence(batch(), COUNTS)
    embeds = read.token.embed(read.model.get_input_embeddings(), whole)
    for row in range(3):
        size = int(whole.valid[row].sum())
        states = decoder(read.model)(inputs_embeds=embeds[row : row + 1, :size]).last_hidden_state
        torch.testing.assert_close(read.hidden(whole)[row : row + 1, :size], states, atol=1e-5, rtol=1e-5)


def test_gradients_reach_the_token_and_pass_through_it(tiny_folder: Any) -> None:
    read = reader(tiny_folder)
    embeddings = read.model.get_input_embeddings()
    embeddings.requires_grad_(True)
    counts = torch.tensor([2, 3, 1])
    made = batch()
    loss = torch.cat(after(read, made, counts)).square().sum()
    loss.backward()
    assert read.token.vector.grad is not None
    assert read.token.vector.grad.abs().sum() > 0
    context = made["context_ids"][made["context_mask"]]
    assert (embeddings.weight.grad[context].abs().sum(-1) > 0).all()


def test_counts() -> None:
    lengths = torch.tensor([0, 1, 8, 9])
    assert FixedGists(3).counts(lengths).tolist() == [0, 3, 3, 3]
    assert GistRatio(4).counts(lengths).tolist() == [0, 1, 2, 3]
    with pytest.raises(UserError, match=r"count\.gists must not be negative"):
        FixedGists(-1)
    with pytest.raises(UserError, match=r"count\.ratio must be at least 1"):
        GistRatio(0.5)


def test_the_token_is_the_mean_of_what_the_embedding_gives(tiny_folder: Any) -> None:
    model = Backbone(pretrained=str(tiny_folder)).load()
    embeddings: Any = model.get_input_embeddings()
    token = GistToken(embeddings)
    torch.testing.assert_close(token.vector.data, embeddings.weight.mean(0))


def test_sliding_windows_are_refused(tiny_folder: Any) -> None:
    read = reader(tiny_folder)
    read.model.config.update({"layer_types": ["sliding_attention"] * 2, "sliding_window": 5})
    with pytest.raises(UserError, match=r"sliding window of the base model \(5\)"):
        read.hidden(sequence(batch(), COUNTS))
