"""What a study leaves in memory: the plain model's rows, at the positions of their tokens, nothing twice."""

from pathlib import Path
from typing import Any

import pytest
import torch
from study_tiny import ASKED, TEXTS, fresh, planned, rows_at, study, tiny

from kvc.cache.memory import KVMemory
from kvc.methods.study import study as study_module
from kvc.methods.study.modes import MODES, Append, Notepad
from kvc.methods.study.reading import read, sampler_of, write

MODES_THAT_WRITE = sorted(MODES.keys() - {"none"})


def stub(written: list[str], prompts: list[list[int]]) -> Any:
    def write_stub(model: Any, tokenizer: Any, memory: KVMemory, prompt: list[int], *rest: Any) -> tuple[str, int, str]:
        prompts.append(list(prompt))
        written.append(f"Number {len(written)} lives in Rome.")
        return written[-1], 7, "stop"

    return write_stub


@pytest.mark.parametrize("budget", [None, 400])
def test_a_budget_that_nothing_exceeds_is_the_plain_model(tmp_path: Path, budget: int | None) -> None:
    model, tokenizer = tiny()
    memory, said = study(tmp_path, budget=budget)
    plan = planned()
    ids = said["token_ids"]
    assert ids == plan.opening + [token for lesson in plan.lessons for token in lesson.ids]
    assert ids[0] == tokenizer.bos_token_id
    assert ids.count(tokenizer.bos_token_id) == 1
    assert all(layer.seen.tolist() == [[[*range(len(ids))]] * layer.seen.shape[1]] for layer in memory.layers)
    for question in ASKED[:4]:
        asked = plan.conversation.question(question.question)
        copy = memory.fork()
        tokens = torch.tensor([asked])
        found = model.generate(tokens, **copy.generate_kwargs(tokens), max_new_tokens=8, do_sample=False)
        whole = model.generate(torch.tensor([ids + asked]), max_new_tokens=8, do_sample=False)
        assert found[0, len(asked) :].tolist() == whole[0, len(ids) + len(asked) :].tolist()


@pytest.mark.parametrize("mode", ["none", *MODES_THAT_WRITE])
def test_ids_rows_and_positions_agree(tmp_path: Path, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study_module, "write", stub([], []))
    memory, said = study(tmp_path, mode=mode, num_epochs=2)
    ids = said["token_ids"]
    assert memory.next_position.tolist() == [len(ids)]
    assert [d["start"] for d in said["documents"][1:]] == [d["end"] for d in said["documents"][:-1]]
    assert said["documents"][-1]["end"] == len(ids)
    plain = fresh(ids)
    for number, layer in enumerate(memory.layers):
        assert layer.seen.shape[2] == 40
        assert bool((layer.seen.diff(dim=-1) > 0).all())
        # Never evicted: the beginning and the newest.
        assert layer.seen[..., :12].tolist() == [[[*range(12)]] * 4]
        assert layer.seen[..., -8:].tolist() == [[[*range(len(ids) - 8, len(ids))]] * 4]
        if number == 0:
            # Rows of the first layer depend on their token and position alone.
            torch.testing.assert_close(layer.keys, rows_at(plain.layers[0].keys, layer.seen), atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(layer.values, rows_at(plain.layers[0].values, layer.seen), atol=1e-5, rtol=1e-5)
    assert not all(torch.equal(memory.layers[0].seen, layer.seen) for layer in memory.layers[1:])


@pytest.mark.parametrize("rotation", ["compact", "place:64"])
def test_moved_rows_are_those_of_a_fresh_forward(tmp_path: Path, rotation: str) -> None:
    kept, said = study(tmp_path / "keep", num_epochs=1)
    moved, same = study(tmp_path / "moved", rotation=rotation)
    assert said["token_ids"] == same["token_ids"]
    end = 40 if rotation == "compact" else 64
    assert moved.next_position.tolist() == [end]
    for layer in moved.layers:
        assert layer.seen.tolist() == [[[*range(12), *range(end - 28, end)]] * 4]
    # In the first layer the policy saw other angles, so the tokens must be found by their values.
    plain = fresh(said["token_ids"])
    table, layer = plain.layers[0].values[0], moved.layers[0]
    for head in range(4):
        distances = (layer.values[0, head][:, None] - table[head]).norm(dim=-1)
        assert float(distances.min(1).values.max()) < 1e-4
        tokens = [said["token_ids"][at] for at in distances.argmin(1).tolist()]
        there = fresh(tokens, layer.seen[0, head].tolist()).layers[0]
        torch.testing.assert_close(layer.keys[0, head], there.keys[0, head], atol=1e-5, rtol=1e-5)
    assert kept.next_position.tolist() == [len(said["token_ids"])]


@pytest.mark.parametrize("mode", MODES_THAT_WRITE)
def test_each_summary_is_in_memory_once_and_no_request_is(
    tmp_path: Path, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []
    prompts: list[list[int]] = []
    monkeypatch.setattr(study_module, "write", stub(written, prompts))
    _, tokenizer = tiny()
    _, said = study(tmp_path, mode=mode, summary_complexity="simple")
    text = tokenizer.decode(said["token_ids"])
    assert len(written) == len(TEXTS)
    for summary, document in zip(written, TEXTS):
        assert text.count(summary) == 1
        assert text.count(document.body) == 1
    assert "(Now I" not in text
    assert "Previous Note" not in text
    asked = [tokenizer.decode(prompt) for prompt in prompts]
    firsts = [1, 4, 7, 10] if mode == "append" else [1] * 4
    assert [ask.endswith(f"\n\n{first}.") for ask, first in zip(asked, firsts)] == [True] * 4
    notes = [f"{first}. {summary}" for first, summary in zip(firsts, written)]
    assert said["note"] == (notes[-1] if mode == "notepad" else "\n".join(notes))
    if mode == "notepad":
        assert "Previous Note" not in asked[0]
        assert all(f"Previous Note:\n{note}" in ask for note, ask in zip(notes, asked[1:]))


def test_lengths_of_summaries() -> None:
    assert "3 short bullet points" in Append("simple").request([]).text
    assert Append("complex").request(["", ""]).first == 11
    assert "5 short bullet points" in Notepad("simple").request(["a {brace}"]).text
    assert "a {brace}" in Notepad("simple").request(["a {brace}"]).text


def test_writing_goes_on_as_the_plain_model_and_leaves_no_trace() -> None:
    model, tokenizer = tiny()
    plan = planned()
    ids = plan.opening + plan.lessons[0].ids
    memory = KVMemory(model)
    read(model, memory, ids, 32)
    before = [layer.keys.clone() for layer in memory.layers]
    prompt = plan.conversation.encode("Document 2: The pet of")
    text, count, _ = write(model, tokenizer, memory, prompt, 12, sampler_of(0, 1.0, 0))
    whole = model.generate(torch.tensor([ids + prompt]), max_new_tokens=12, do_sample=False)
    plain = tokenizer.decode(whole[0, len(ids) + len(prompt) :], skip_special_tokens=True)
    assert text == plain.split("---")[0].split("</think>")[0].strip()
    assert 0 < count <= 12
    assert memory.next_position.tolist() == [len(ids)]
    assert all(torch.equal(layer.keys, old) for layer, old in zip(memory.layers, before))


def test_writing_does_not_change_what_is_evicted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The queries of a request, and of the tokens written after it, score nothing."""
    real, said = study(tmp_path / "real", mode="takeaways", max_new_tokens=6, budget=60)
    texts = iter([summary["text"][3:] for summary in said["summaries"]])
    monkeypatch.setattr(study_module, "write", lambda *_: (next(texts), 1, "stop"))
    given, _ = study(tmp_path / "given", mode="takeaways", max_new_tokens=6, budget=60)
    for layer, other in zip(real.layers, given.layers):
        assert torch.equal(layer.seen, other.seen)
        assert torch.equal(layer.keys, other.keys)


def test_the_words_are_those_that_the_tiny_model_was_trained_on() -> None:
    _, tokenizer = tiny()
    plan = planned()
    ids = plan.opening + plan.lessons[0].ids + plan.conversation.question("Where does Tina live?")
    assert tokenizer.decode(ids) == (
        "<|bos|>User: Study these documents and learn what they say.\nAssistant:\n<think>\n"
        f"Document 1: {TEXTS[0].body}\n</think>\nLearning has completed.<|eos|>\n"
        "User: Question: Where does Tina live?\nAssistant:\nAnswer:"
    )
    alone = tokenizer.decode(plan.conversation.alone("Where does Tina live?"))
    assert alone == "<|bos|>User: Question: Where does Tina live?\nAssistant:\nAnswer:"
