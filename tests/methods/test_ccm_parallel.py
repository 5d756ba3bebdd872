"""The parallel form: what cannot be seen has no effect, kernels and precisions agree, and bad input is one sentence."""

from typing import Any

import ccm_tiny as tiny
import pytest
import torch
from torch import nn

from kvc.core.attention import check_window
from kvc.core.masks import Kind
from kvc.errors import UserError
from kvc.methods.ccm.merging import Ema, Mean, weights
from kvc.methods.ccm.parallel import Compressor
from kvc.methods.ccm.tokens import MemoryTokens, strided_means

KINDS: list[Kind] = ["concat", "concat_recur", "merge", "merge_recur", "gist", "full", "no_context"]


def logits(compressor: Compressor, rows: list[tiny.Context], left: bool = True, **kwargs: Any) -> list[torch.Tensor]:
    ids, mask, kept = tiny.sequences(rows, compressor.tokens.slots, left)
    output = compressor.hidden(ids, mask, kept, **kwargs)
    return tiny.tails(compressor.logits(output.last_hidden_state), mask, rows)


def gradients(compressor: Compressor, rows: list[tiny.Context]) -> dict[str, torch.Tensor]:
    sum(out.logsumexp(-1).sum() for out in logits(compressor, rows)).backward()
    named = [("table", compressor.tokens.table), *compressor.model.named_parameters()]
    return {name: p.grad for name, p in named if p.grad is not None}


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_padding_side_and_kernel_do_not_matter(kind: Kind) -> None:
    rows = tiny.contexts([3, 1, 0, 4])
    expected = logits(tiny.compressor(kind=kind), rows)
    for found in (
        logits(tiny.compressor(kind=kind), rows, left=False),
        logits(tiny.compressor(kind=kind, attention="eager"), rows),
    ):
        for row, other in zip(expected, found, strict=True):
            torch.testing.assert_close(other, row, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["concat_recur", "merge_recur"])
@torch.no_grad()
def test_block_masks_give_the_same(kind: Kind) -> None:
    rows = tiny.contexts([3, 1, 0, 4])
    blocks = logits(tiny.compressor(kind=kind, attention="flex_attention"), rows)
    for row, other in zip(logits(tiny.compressor(kind=kind), rows), blocks, strict=True):
        torch.testing.assert_close(other, row, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_with_checkpointing(kind: Kind) -> None:
    rows = tiny.contexts([3, 1, 2])
    expected = gradients(tiny.compressor(kind=kind), rows)
    assert "table" in expected
    compressor = tiny.compressor(kind=kind)
    compressor.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    compressor.model.train()
    found = gradients(compressor, rows)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["concat", "concat_recur", "merge", "merge_recur"])
@torch.no_grad()
def test_the_context_acts_through_the_memory_alone(kind: Kind) -> None:
    """Were keys and values of the memory those of another context, the tail would be that of the other context."""
    mine, other = tiny.contexts([3], seed=0)[0], tiny.contexts([3], seed=0)[0]
    for chunk in other.chunks:
        chunk[:] = [(token + 7) % 60 + 3 for token in chunk]
    compressor = tiny.compressor(kind=kind)
    ids, mask, kept = tiny.sequences([mine], 2)
    ids_other, _, _ = tiny.sequences([other], 2)
    is_chunk = (ids != ids_other)[0]
    first, second = tiny.compressor(kind=kind), tiny.compressor(kind=kind)

    def swap(into: Compressor) -> None:
        """Outputs of the key and value projections at evicted tokens become noise for the tail's layer."""
        for layer in into.model.get_base_model().model.layers:
            for projection in (layer.self_attn.k_proj, layer.self_attn.v_proj):
                projection.register_forward_hook(noise)

    def noise(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        return torch.where(is_chunk[None, :, None], torch.full_like(output, 3.0), output)

    expected = first.logits(first.hidden(ids, mask, kept).last_hidden_state)
    assert not torch.allclose(
        expected[0, -1], compressor.logits(compressor.hidden(ids_other, mask, kept).last_hidden_state)[0, -1], atol=1e-3
    )
    memory = {}

    def remember(name: str) -> Any:
        def hook(module: Any, args: Any, output: torch.Tensor) -> None:
            memory[name] = output

        return hook

    def recall(name: str) -> Any:
        def hook(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
            return torch.where((ids >= 64)[..., None], memory[name], output)

        return hook

    def projections(into: Compressor) -> Any:
        for index, layer in enumerate(into.model.get_base_model().model.layers):
            for name in ("k_proj", "v_proj"):
                yield f"{index}.{name}", getattr(layer.self_attn, name)

    for name, projection in projections(compressor):
        projection.register_forward_hook(remember(name))
    compressor.hidden(ids, mask, kept)
    # The other context, evicted rows of noise, and the memory of mine: the tail must be mine.
    for name, projection in projections(second):
        projection.register_forward_hook(recall(name))
    swap(second)
    found = second.logits(second.hidden(ids_other, mask, kept).last_hidden_state)
    size = len(mine.tail)
    torch.testing.assert_close(found[0, -size:], expected[0, -size:], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_without_context_the_context_has_no_effect() -> None:
    rows = tiny.contexts([3, 1])
    compressor = tiny.compressor(kind="no_context")
    expected = logits(compressor, rows)
    for row in rows:
        for chunk in row.chunks:
            chunk[:] = [(token + 7) % 60 + 3 for token in chunk]
    for found, before in zip(logits(compressor, rows), expected):
        assert torch.equal(found, before)


@pytest.mark.parametrize("kind", ["concat_recur", "merge_recur"])
@torch.no_grad()
def test_tokens_before_the_first_run_get_the_base_model(kind: Kind) -> None:
    row = tiny.Context([], [[5, 6, 7, 8]], [9])
    ids, mask, _ = tiny.sequences([row], 2)
    compressor = tiny.compressor(kind=kind)
    found = compressor.logits(compressor.hidden(ids, mask).last_hidden_state)
    torch.testing.assert_close(found[:, :4], tiny.plain()(ids[:, :4]).logits, atol=1e-6, rtol=1e-6)
    for parameter in compressor.model.parameters():
        if parameter.requires_grad:
            parameter.mul_(10)
    compressor.tokens.table.mul_(10)
    assert torch.equal(compressor.logits(compressor.hidden(ids, mask).last_hidden_state)[:, :4], found[:, :4])


@pytest.mark.parametrize("kind", KINDS)
def test_mixed_precision_trains(kind: Kind) -> None:
    compressor = tiny.compressor(kind=kind)
    compressor.model.get_base_model().to(torch.bfloat16)
    for parameter in compressor.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    rows = tiny.contexts([3, 0, 2])
    with torch.autocast("cpu", torch.bfloat16):
        loss = sum(out.float().logsumexp(-1).sum() for out in logits(compressor, rows))
    loss.backward()
    assert compressor.tokens.table.dtype == torch.float32
    assert torch.isfinite(compressor.tokens.table.grad).all()
    assert compressor.tokens.table.grad.any() == (kind != "no_context")


def test_a_batch_without_runs() -> None:
    for kind in KINDS:
        rows = tiny.contexts([0, 0])
        for found, row in zip(logits(tiny.compressor(kind=kind), rows), rows):
            ids = torch.tensor([row.prompt + row.tail])
            expected = tiny.plain()(ids).logits[0, -len(row.tail) :]
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_heads_that_scale_their_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tiny.FAMILIES, "granite", {"model_type": "granite", **tiny.SHAPE, "logits_scaling": 8.0})
    (row,) = tiny.contexts([0])
    expected = tiny.plain("granite")(torch.tensor([row.prompt + row.tail])).logits[0, -len(row.tail) :]
    torch.testing.assert_close(logits(tiny.compressor("granite"), [row])[0], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rule", [Mean(), Ema(0.25), Ema(1.0)])
def test_weights_of_merging_are_the_recursion(rule: Any) -> None:
    runs = torch.randn(6, dtype=torch.float64)
    memory = torch.zeros((), dtype=torch.float64)
    for step, (run, row) in enumerate(zip(runs, weights(rule, 6, torch.device("cpu"))), start=1):
        share = float(rule.share(torch.tensor(step)))
        memory = (1 - share) * memory + share * run
        torch.testing.assert_close(row.double() @ runs, memory, atol=1e-6, rtol=1e-6)


def test_memory_tokens_keep_the_vocabulary() -> None:
    embedding = nn.Embedding(10, 4, dtype=torch.bfloat16)
    tokens = MemoryTokens(embedding, 3)
    assert tokens.table.dtype == torch.float32
    torch.testing.assert_close(tokens.table.data[2], embedding.weight[0::3].float().mean(0))
    torch.testing.assert_close(tokens.table.data[0], embedding.weight[2::3].float().mean(0))
    ids = torch.tensor([[1, 10, 11, 12, 9]])
    assert tokens.slot(ids).tolist() == [[-1, 0, 1, 2, -1]]
    assert torch.equal(tokens.run(2), torch.tensor([[10, 11, 12]] * 2))
    found = tokens.embed(embedding, ids)
    assert torch.equal(found[0, [0, 4]], embedding.weight[[1, 9]])
    assert torch.equal(found[0, 1:4], tokens.table.bfloat16())


def test_bad_input_is_refused() -> None:
    embedding = nn.Embedding(4, 2)
    with pytest.raises(UserError, match="slots: a run needs at least one"):
        MemoryTokens(embedding, 0)
    with pytest.raises(UserError, match="slots: 5 memory tokens are more than the 4 rows"):
        strided_means(embedding, 5)
    with pytest.raises(UserError, match="rate: the share of the newest run"):
        Ema(0.0)
    for run in ([64], [65], [64, 66], [64, 65, 66]):
        ids = torch.tensor([[5, *run, 6]])
        with pytest.raises(UserError, match="row 0 has an incomplete run of memory tokens"):
            tiny.compressor().hidden(ids, torch.ones_like(ids))
    gated = tiny.compressor()
    with pytest.raises(UserError, match="cond_lora: the adapters of this model were made conditional before"):
        Compressor(gated.model, gated.tokens, conditional=False)
    flex = tiny.adapted(tiny.plain())
    flex.get_base_model().config._attn_implementation = "flash_attention_2"
    with pytest.raises(UserError, match="attn_implementation: flash_attention_2"):
        logits(Compressor(flex, MemoryTokens(flex.get_input_embeddings(), 2)), tiny.contexts([1]))
    narrow = tiny.adapted(tiny.plain("mistral", sliding_window=4))
    with pytest.raises(UserError, match=r"sliding window of the base model \(4\)"):
        logits(Compressor(narrow, MemoryTokens(narrow.get_input_embeddings(), 2)), tiny.contexts([2]))
    chunked = tiny.compressor()
    chunked.model.config.update({"layer_types": ["full_attention", "chunked_attention"], "attention_chunk_size": 4})
    with pytest.raises(UserError, match=r"sliding window of the base model \(4\)"):
        check_window(chunked.model, 5)
    check_window(chunked.model, 4)
