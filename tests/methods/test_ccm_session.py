"""A session gives what one forward over the whole sequence gives, holds only memory tokens, and survives a file."""

import doctest
from typing import Any

import ccm_tiny as tiny
import pytest
import torch
from transformers import AutoTokenizer

from kvc.cache.memory import KVMemory
from kvc.cache.store import save_memory
from kvc.core.backbone import tiny_folder
from kvc.errors import UserError
from kvc.generation.decode import generate
from kvc.methods.ccm import session as module
from kvc.methods.ccm.merging import Ema
from kvc.methods.ccm.parallel import Compressor
from kvc.methods.ccm.session import Session
from kvc.methods.ccm.tokens import MemoryTokens

KINDS = ["concat", "concat_recur", "merge", "merge_recur"]
NEAR: dict[str, Any] = {"atol": 1e-5, "rtol": 1e-4}
COUNTS = [3, 1, 0, 4]


def opened(compressor: Compressor, rows: list[tiny.Context], sink: bool = False) -> Session:
    """A session that has read everything but the tails; with a sink, the prompts are one token each."""
    session = Session(compressor, sink=sink)
    if not sink and any(row.prompt for row in rows):
        session.keep([row.prompt for row in rows])
    for step in range(max(len(row.chunks) for row in rows)):
        chunks = [row.chunks[step] if step < len(row.chunks) else [] for row in rows]
        session.compress([row.prompt + chunk for row, chunk in zip(rows, chunks)] if sink and not step else chunks)
    return session


@torch.no_grad()
def parallel(compressor: Compressor, rows: list[tiny.Context]) -> list[torch.Tensor]:
    ids, mask, kept = tiny.sequences(rows, compressor.tokens.slots)
    output = compressor.hidden(ids, mask, kept)
    return tiny.tails(compressor.logits(output.last_hidden_state), mask, rows)


def agree(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, **NEAR)


def of(family: str = "llama-gqa", **fields: Any) -> Compressor:
    """A compressor on a model with other fields."""
    model = tiny.adapted(tiny.plain(family, **fields))
    return Compressor(model, MemoryTokens(model.get_input_embeddings(), 2))


def sunk(counts: list[int]) -> list[tiny.Context]:
    """Contexts whose prompt is one token, and the others begin with a chunk."""
    return [tiny.Context([1], row.chunks, row.tail) for row in tiny.contexts(counts)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_logits_of_a_ragged_batch_are_those_of_one_forward(family: str, kind: Any) -> None:
    rows = tiny.contexts(COUNTS)
    compressor = tiny.compressor(family, kind=kind)
    session = opened(compressor, rows)
    found = session.logits([row.tail for row in rows])
    agree(found, parallel(compressor, rows))
    for line, row in zip(found, rows):
        agree([line], parallel(compressor, [row]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("slots", [1, 3])
@pytest.mark.parametrize("positions", ["skip", "base"])
def test_sink_number_of_tokens_and_positions(kind: Any, slots: int, positions: Any) -> None:
    rows = sunk([2, 1, 4])
    compressor = tiny.compressor(slots=slots, kind=kind, positions=positions)
    session = opened(compressor, rows, sink=True)
    agree(session.logits([row.tail for row in rows]), parallel(compressor, rows))
    runs = [min(count, 1) if kind.startswith("merge") else count for count in (2, 1, 4)]
    assert session.tokens.tolist() == [1 + slots * count for count in runs]
    text = [1 + sum(map(len, row.chunks)) for row in rows]
    counted = [slots * count if positions == "base" else 0 for count in (2, 1, 4)]
    assert session.next_position.tolist() == [a + b for a, b in zip(text, counted)]


@pytest.mark.parametrize("kind", ["merge", "merge_recur"])
def test_moving_average_and_ordinary_lora(kind: Any) -> None:
    rows = tiny.contexts(COUNTS)
    for settings in ({"merge": Ema(0.3)}, {"conditional": False}):
        compressor = tiny.compressor(kind=kind, **settings)
        agree(opened(compressor, rows).logits([row.tail for row in rows]), parallel(compressor, rows))


def test_bytes_are_those_of_the_rows_held() -> None:
    """2 layers, keys and values, 2 KV heads of 8, float32, and a position of 4 bytes; padded slots are held too."""
    row = 2 * 2 * 2 * 8 * 4
    for kind, held in (("concat_recur", 6), ("merge_recur", 2)):
        session = opened(tiny.compressor(kind=kind), tiny.contexts([3, 1], prompt=0))
        assert session.steps.tolist() == [3, 1]
        assert session.tokens.tolist() == [held, 2]
        extra = session.bytes - 2 * held * row
        assert 0 < extra <= 2 * 2 * held * 2 * 4, "positions, and no more"
        longest = max(map(len, tiny.contexts([3, 1], prompt=0)[0].chunks))
        assert int(session.peak[0]) >= longest + 2


def test_bytes_count_what_isolated_chunks_see() -> None:
    rows = [tiny.Context([3] * 20, [[5, 6], [7, 8]], [9])]
    isolated, recurrent = (opened(tiny.compressor(kind=kind), rows) for kind in ("concat", "concat_recur"))
    assert isolated.tokens.tolist() == recurrent.tokens.tolist() == [24]
    assert isolated.bytes >= recurrent.bytes + 20 * 2 * 2 * 2 * 8 * 4


@pytest.mark.parametrize("conditional", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_generate_follows_the_logits_and_leaves_the_memory(kind: Any, conditional: bool) -> None:
    rows = tiny.contexts([2, 3])
    compressor = tiny.compressor(kind=kind, conditional=conditional)
    session = opened(compressor, rows)
    before = session.logits([row.tail for row in rows])
    held = session.bytes
    output = session.generate([row.tail for row in rows], max_new_tokens=5, eos_token_id=())
    longer = session.logits([row.tail + new[:-1] for row, new in zip(rows, output.tokens)])
    for line, new in zip(longer, output.tokens):
        assert line[-5:].argmax(-1).tolist() == new
    assert session.bytes == held
    assert output.usage.summary(0)["kv_tokens_final"] == int(session.tokens[0]) + len(rows[0].tail) + 4
    for first, again in zip(before, session.logits([row.tail for row in rows])):
        assert torch.equal(first, again)


def test_generate_of_a_session_that_read_nothing_is_the_base_model() -> None:
    compressor = tiny.compressor()
    found = Session(compressor).generate([[5, 6, 7], [8, 9]], max_new_tokens=4, eos_token_id=())
    ids, mask = tiny.padded([[5, 6, 7], [8, 9]])
    expected = generate(tiny.plain(), ids, mask, max_new_tokens=4, eos_token_id=())
    assert found.tokens == expected.tokens


def test_one_context_answers_several_queries_and_goes_several_ways() -> None:
    compressor = tiny.compressor()
    (row,) = tiny.contexts([2])
    session = opened(compressor, [row])
    both = session.logits([[5, 6, 7], [8, 9]])
    agree([both[1]], session.logits([[8, 9]]))
    session.compress([[5, 6, 7], [8, 9]])
    assert session.steps.tolist() == [3, 3]
    other = opened(compressor, [tiny.Context(row.prompt, [*row.chunks, [8, 9]], [])])
    agree(session.logits([[3], [3]])[1:], other.logits([[3]]))


@pytest.mark.parametrize("sink", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_session_from_a_file_goes_on_to_the_bit(kind: Any, sink: bool, tmp_path: Any) -> None:
    """All that later logits depend on is in the file, and that is memory tokens and kept ones only."""
    rows = sunk([2, 1]) if sink else tiny.contexts(COUNTS)
    session = opened(tiny.compressor(kind=kind), rows, sink)
    session.save(tmp_path / "talk")
    again = Session.load(tmp_path / "talk", tiny.compressor(kind=kind))
    assert again.sink == sink
    assert again.steps.tolist() == session.steps.tolist()
    assert again.peak.tolist() == session.peak.tolist()
    assert again.tokens.tolist() == session.tokens.tolist()
    chunks, queries = [[5, 6, 7, 8], [9], [10, 11], []][: len(rows)], [row.tail for row in rows]
    for _ in range(2):
        for ours, theirs in zip(again.logits(queries), session.logits(queries), strict=True):
            assert torch.equal(ours, theirs)
        again.compress(chunks)
        session.compress(chunks)
    assert again.bytes == session.bytes


def test_evicted_text_cannot_change_later_logits() -> None:
    """Two texts of the same length, one memory: the same answers, whatever the text was."""
    compressor = tiny.compressor()
    ours, other = (opened(compressor, [tiny.Context([3], [chunk], [])]) for chunk in ([5, 6, 7], [40, 41, 42]))
    queries = [[8, 9, 10]]
    assert not torch.allclose(ours.logits(queries)[0], other.logits(queries)[0], atol=1e-3)
    for index, layer in enumerate(ours._held.memory.layers):
        assert layer.keys.shape[2] == 3
        other._held.memory.replace(
            index, (-2, None), layer.keys[:, :, -2:], layer.values[:, :, -2:], layer.positions[..., -2:]
        )
    other._held.memory.next_position = ours.next_position
    for _ in range(2):
        assert torch.equal(ours.logits(queries)[0], other.logits(queries)[0])
        ours.compress([[11, 12]])
        other.compress([[11, 12]])


def test_other_readers_are_refused(tmp_path: Any) -> None:
    opened(tiny.compressor(), tiny.contexts([1])).save(tmp_path)

    def refused(words: str, reader: Compressor) -> None:
        with pytest.raises(UserError, match=words):
            Session.load(tmp_path, reader)

    foreign = of(initializer_range=0.1)
    refused("another base model than 'LlamaForCausalLM'", foreign)
    refused("kind: the session was made with concat_recur, here it is merge_recur", tiny.compressor(kind="merge_recur"))
    refused("slots: the session was made with 2, here it is 3", tiny.compressor(slots=3))
    refused("positions: the session was made with skip, here it is base", tiny.compressor(positions="base"))
    refused("cond_lora: the session was made with True, here it is False", tiny.compressor(conditional=False))
    tokens = tiny.compressor()
    tokens.tokens.table.data[0, 0] += 1
    refused("another adapter or other memory tokens", tokens)
    lora = tiny.compressor()
    next(p for name, p in lora.model.named_parameters() if ".lora_B." in name).data[0, 0] += 1
    refused("another adapter or other memory tokens", lora)
    with pytest.raises(UserError, match="there is no such file"):
        Session.load(tmp_path / "elsewhere", tiny.compressor())


def test_merge_rule_and_foreign_memories_are_refused(tmp_path: Any) -> None:
    compressor = tiny.compressor(kind="merge", merge=Ema(0.3))
    opened(compressor, tiny.contexts([1])).save(tmp_path)
    with pytest.raises(UserError, match=r"merge: the session was made with {'rule': 'Ema', 'rate': 0.3}"):
        Session.load(tmp_path, tiny.compressor(kind="merge", merge=Ema(0.4)))
    memory = KVMemory(compressor.model)
    compressor.model(torch.tensor([[5, 6]]), past_key_values=memory)
    save_memory(memory, tmp_path / module.FILE, compressor.model)
    with pytest.raises(UserError, match="not one of a CCM session"):
        Session.load(tmp_path, compressor)
    with pytest.raises(UserError, match="the memory is empty"):
        Session(compressor).save(tmp_path)


def test_bad_rows_are_refused() -> None:
    session = opened(tiny.compressor(), tiny.contexts([1, 2]))
    for words, call in (
        ("chunks: 3 rows do not fit a session that holds 2", lambda: session.compress([[5]] * 3)),
        ("chunks: the base model has no token 64, memory tokens", lambda: session.compress([[64], [5]])),
        ("queries: give a list with one text for each row", lambda: session.generate("how?", max_new_tokens=1)),
        ("queries: a session without a tokenizer takes ids", lambda: session.logits(["how?", "why?"])),
        ("prompts must not be empty", lambda: session.generate([[5], []], max_new_tokens=1)),
        ("texts: those to keep come before", lambda: session.keep([[5], [6]])),
        (
            "memory: a session generates from its own",
            lambda: session.generate([[5]] * 2, max_new_tokens=1, memory=None),
        ),
        ("sink: has no effect with texts that are kept", lambda: Session(tiny.compressor(), sink=True).keep([[5]])),
        ("row 1 needs a token beside the sink", lambda: Session(tiny.compressor(), sink=True).compress([[5, 6], [7]])),
        ("cannot compress chunk by chunk", lambda: Session(tiny.compressor(kind="gist"))),
    ):
        with pytest.raises(UserError, match=words):
            call()
    assert session.steps.tolist() == [1, 2]


def test_train_mode_and_sliding_windows_are_refused() -> None:
    compressor = tiny.compressor()
    compressor.model.train()
    with pytest.raises(UserError, match="model: a session in train mode"):
        Session(compressor).compress([[5]])
    narrow = of("mistral", sliding_window=8)
    session = opened(narrow, [tiny.Context([], [[5, 6, 7]], [])])
    with pytest.raises(UserError, match="a sequence of 9 tokens is longer than the sliding window"):
        session.generate([[8, 9]], max_new_tokens=4)


def test_texts_begin_with_bos_once() -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder())
    compressor = of(vocab_size=len(tokenizer))
    session, ids = Session(compressor, tokenizer), Session(compressor)
    parts = [["Tom has 3 apples. ", ""], ["He eats one. ", "Ann has 5 pears. "]]
    for step, chunks in enumerate(parts):
        session.compress(chunks)
        rows = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in chunks]
        starts = [[tokenizer.bos_token_id], []] if step == 0 else [[], [tokenizer.bos_token_id]]
        ids.compress([start + row for start, row in zip(starts, rows)])
    for ours, theirs in zip(session.logits([[5, 6], [7]]), ids.logits([[5, 6], [7]]), strict=True):
        assert torch.equal(ours, theirs)
    output = session.generate(["How many? ", "How many? "], max_new_tokens=2)
    assert output.texts is not None
    assert len(output.texts) == 2


def test_the_example_of_the_docstring() -> None:
    assert doctest.testmod(module).failed == 0
