"""Decoding after summary vectors: with a cache as without, in batches, and compressing on the way."""

from typing import Any

import pytest
import torch
from autocompressor_tiny import ALL, base, fixed, padded, variable

from kvc.errors import UserError
from kvc.generation.sampling import Sampling
from kvc.methods.autocompressor import AutoCompressorModel
from kvc.methods.autocompressor.compressor import Compressor
from kvc.methods.autocompressor.controls import TableControls
from kvc.methods.autocompressor.decoding import generate
from kvc.methods.autocompressor.rolling import generate_segments
from kvc.methods.autocompressor.softprompt import SoftPrompt
from kvc.methods.autocompressor.stopping import Stopping

MAKERS: dict[str, Any] = {"fixed": fixed, "replace": lambda *a: fixed(*a, accumulate=False), "variable": variable}
NEW = 6


def text(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 64, shape, generator=torch.Generator().manual_seed(seed))


def prompt_of(compressor: Compressor, rows: int) -> SoftPrompt:
    with torch.no_grad():
        return compressor.read(text(rows, 10, seed=4), output_softprompt=True).prompt


def one(prompt: SoftPrompt, row: int) -> SoftPrompt:
    return SoftPrompt(prompt.vectors[row : row + 1, prompt.valid[row]])


@torch.no_grad()
def without_cache(compressor: Compressor, ids: list[int], prompt: SoftPrompt | None, segment: int = 10**6) -> list[int]:
    """Greedy tokens, each from a forward over everything since the last summary."""
    chunk: list[int] = []
    new: list[int] = []
    waiting = list(ids)
    while len(new) < NEW:
        while waiting:
            chunk.append(waiting.pop(0))
            reading = compressor.read(torch.tensor([chunk]), softprompt=prompt, output_softprompt=len(chunk) == segment)
            if len(chunk) == segment:
                prompt, chunk = reading.prompt, []
        new.append(int(compressor.logits(reading.hidden[0, -1]).argmax()))
        waiting = [new[-1]]
    return new


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("family", ALL)
def test_a_left_padded_batch_with_cache_equals_rows_without(family: str, maker: str) -> None:
    compressor = MAKERS[maker](family)
    prompt = prompt_of(compressor, 3)
    rows = [text(size, seed=size).tolist() for size in (7, 4, 1)]
    ids, mask = padded(rows)
    found = generate(compressor, ids, mask, prompt, max_new_tokens=NEW, do_sample=False, eos_token_id=None)
    for row, tokens in enumerate(rows):
        assert found[row, ids.shape[1] :].tolist() == without_cache(compressor, tokens, one(prompt, row))


def test_without_vectors_it_is_the_plain_model() -> None:
    for family in ("llama-gqa", "opt"):
        compressor = fixed(family)
        ids, mask = padded([text(7).tolist(), text(4, seed=1).tolist()])
        plain = compressor.model.generate(
            ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, eos_token_id=None
        )
        found = generate(compressor, ids, mask, None, max_new_tokens=NEW, do_sample=False, eos_token_id=None)
        assert torch.equal(found, plain)


def test_beams_see_the_vectors_of_their_prompt() -> None:
    compressor = variable()
    prompt, ids = prompt_of(compressor, 2), text(2, 5)
    settings = {"max_new_tokens": NEW, "num_beams": 3, "do_sample": False, "eos_token_id": None}
    both = generate(compressor, ids, None, prompt, **settings)
    for row in range(2):
        alone = generate(compressor, ids[row : row + 1], None, one(prompt, row), **settings)
        assert torch.equal(both[row], alone[0])


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("family", ["llama-gqa", "qwen3", "opt", "opt-350m"])
@pytest.mark.parametrize("segment", [1, 3, 5])
def test_compressing_on_the_way_equals_reading_anew(family: str, maker: str, segment: int) -> None:
    """Rows reach the end of a segment at different steps, and prompts may be longer than several."""
    compressor = MAKERS[maker](family)
    prompt = prompt_of(compressor, 3)
    rows = [text(size, seed=size).tolist() for size in (11, 5, 2)]
    ids, mask = padded(rows)
    found = generate_segments(
        compressor, ids, mask, prompt, segment_length=segment, max_new_tokens=NEW, eos_token_id=()
    )
    for row, tokens in enumerate(rows):
        expected = without_cache(compressor, tokens, one(prompt, row), segment)
        assert found.sequences[row, ids.shape[1] :].tolist() == expected, f"row {row}"
    assert found.prompt.vectors.shape[1] == int(found.prompt.lengths.max()), "slots that no row needs"


def test_rows_without_any_vector_go_on() -> None:
    compressor = variable(stop=Stopping("threshold", 0.0))
    ids, mask = padded([text(4).tolist(), text(2, seed=1).tolist()])
    found = generate_segments(compressor, ids, mask, None, segment_length=3, max_new_tokens=NEW, eos_token_id=())
    assert found.prompt.lengths.tolist() == [0, 0]
    for row, tokens in enumerate([text(4).tolist(), text(2, seed=1).tolist()]):
        assert found.sequences[row, 4:].tolist() == without_cache(compressor, tokens, None, 3)


@torch.no_grad()
def test_a_row_that_has_ended_changes_nothing() -> None:
    compressor = fixed()
    ids = text(3, 4)
    settings: dict[str, Any] = {"segment_length": 3, "max_new_tokens": 12}
    free = generate_segments(compressor, ids, None, None, eos_token_id=(), **settings).sequences
    end = int(free[1, 6])
    output = generate_segments(compressor, ids, None, None, eos_token_id=end, **settings)
    ended = output.sequences
    for row in range(3):
        stop = (free[row, 4:] == end).nonzero()
        last = 5 + int(stop[0]) if len(stop) else ended.shape[1]
        assert torch.equal(ended[row, :last], free[row, :last])
        assert (ended[row, last:] == 0).all(), "padding follows the end"
        alone = generate_segments(compressor, ids[row : row + 1], None, None, eos_token_id=end, **settings).prompt
        torch.testing.assert_close(output.prompt.vectors[row, output.prompt.valid[row]], alone.vectors[0])


def test_the_cache_stays_small() -> None:
    """Of columns that no row holds any more nothing is kept, although rows compress at different steps."""
    compressor = fixed(accumulate=False)
    ids, mask = padded([text(4).tolist(), text(2, seed=1).tolist()])
    found = generate_segments(compressor, ids, mask, None, segment_length=4, max_new_tokens=40, eos_token_id=())
    assert found.peak <= 2 * (3 + 4)


def test_samples_are_those_of_the_seed() -> None:
    compressor, ids = fixed(), text(2, 4)
    runs = [
        generate_segments(
            compressor, ids, None, None, segment_length=3, max_new_tokens=8, sampler=Sampling(2.0, seed=seed)
        ).sequences
        for seed in (0, 0, 1)
    ]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_control_tokens_are_never_written() -> None:
    model = base(vocab_size=66)
    with torch.no_grad():
        model.get_output_embeddings().weight[64:] *= 50
    compressor = variable(model=model, controls=TableControls(64, 65))
    ids = text(4, 5)
    plain = model.generate(ids, max_new_tokens=NEW, do_sample=False, eos_token_id=None)
    assert (plain >= 64).any()
    found = generate(compressor, ids, None, None, max_new_tokens=NEW, do_sample=False, eos_token_id=None)
    assert not (found >= 64).any()
    segments = generate_segments(compressor, ids, None, None, segment_length=3, max_new_tokens=NEW, eos_token_id=())
    assert not (segments.sequences >= 64).any()


def test_the_model_generates_either_way() -> None:
    model = AutoCompressorModel(base())
    ids = text(1, 5)
    vectors = model(text(1, 10), output_softprompt=True).softprompt
    assert vectors.shape == (1, 50, 32)
    assert model.generate(ids, softprompt=vectors, max_new_tokens=3, eos_token_id=None).shape == (1, 8)
    assert model.generate(ids, softprompt=vectors, segment_lengths=4, max_new_tokens=3, eos_token_id=()).shape == (1, 8)


def test_bad_requests() -> None:
    compressor = fixed()
    ids, mask = padded([text(5).tolist(), text(3).tolist()], left=False)
    with pytest.raises(UserError, match="padded on the left"):
        generate(compressor, ids, mask, None, max_new_tokens=2)
    with pytest.raises(UserError, match="use_cache"):
        generate(compressor, ids, None, prompt_of(compressor, 2), max_new_tokens=2, use_cache=False)
    gated = variable(gate="log")
    soft = gated.read(ids, output_softprompt=True, soft=True).prompt
    with pytest.raises(UserError, match="eval mode"):
        generate(gated, ids, None, soft, max_new_tokens=2)
    with pytest.raises(UserError, match="65 positions, the base model has 64"):
        generate(fixed("opt"), text(1, 60), None, None, max_new_tokens=5)
    with pytest.raises(UserError, match="do_sample"):
        AutoCompressorModel(base()).generate(ids, segment_lengths=4, max_new_tokens=2, do_sample=True)
    given = variable(model=base(vocab_size=66), controls=TableControls(64, 65), insertion="given")
    with pytest.raises(UserError, match="appended"):
        generate_segments(given, ids, None, None, segment_length=3, max_new_tokens=2)
    compressor.model.train()
    with pytest.raises(UserError, match=r"model\.eval"):
        generate(compressor, ids, None, None, max_new_tokens=2)
