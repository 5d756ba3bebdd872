"""`model.generate` on a memory: the plain tokens while nothing is dropped, rows that do not disturb each other."""

from typing import Any

import pytest
import torch
from kv_models import left_padded, tiny, tokens

from kvc.cache.memory import KVMemory

GREEDY: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
SAMPLED = {**GREEDY, "do_sample": True, "temperature": 0.8, "top_p": 0.9}


def generate(model: Any, ids: torch.Tensor, seed: int = 7, **kwargs: Any) -> torch.Tensor:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return model.generate(ids, **kwargs)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "opt", "mistral", "gemma3"])
@pytest.mark.parametrize("how", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_without_eviction_the_plain_models_tokens(family: str, attention: str, how: dict[str, Any]) -> None:
    model = tiny(family, attention)
    ids, mask = left_padded([tokens(5), tokens(9, seed=1)])
    memory = KVMemory(model)
    ours = generate(model, ids, **memory.generate_kwargs(ids, mask), **how)
    assert torch.equal(ours, generate(model, ids, attention_mask=mask, **how))
    assert memory.next_position.tolist() == [12, 16]
    assert memory.layers[1].positions[:, -1, -2:].tolist() == [[10, 11], [14, 15]]


def test_adapters_and_assisted_decoding() -> None:
    """A wrapper of PEFT around the model, and a decoder that takes tokens back."""
    import copy

    from peft import LoraConfig, get_peft_model

    model, ids = tiny("llama"), tokens(1, 6).repeat(1, 2)
    memory = KVMemory(model)
    ours = generate(model, ids, **memory.generate_kwargs(ids), prompt_lookup_num_tokens=3, **GREEDY)
    assert torch.equal(ours, generate(model, ids, **GREEDY))
    assert memory.layers[0].positions[0, 0].tolist() == list(range(int(memory.next_position)))
    config = LoraConfig(r=2, target_modules=["k_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    adapted = get_peft_model(copy.deepcopy(model), config).eval()
    memory = KVMemory(adapted)
    assert torch.equal(
        generate(adapted, ids, **memory.generate_kwargs(ids), **GREEDY), generate(adapted, ids, **GREEDY)
    )


@pytest.mark.parametrize("more", [{"num_return_sequences": 3, **SAMPLED}, {"num_beams": 3, **GREEDY}], ids=str)
def test_several_sequences_from_one_prompt(more: dict[str, Any]) -> None:
    model, ids = tiny("llama"), tokens(1, 6)
    memory = KVMemory(model)
    ours = generate(model, ids, **memory.generate_kwargs(ids), **more)
    assert torch.equal(ours, generate(model, ids, **more))
    assert len(memory.next_position) == 3


def test_many_continuations_of_one_shrunken_memory() -> None:
    model, kept = tiny("llama"), torch.tensor([[[0, 2, 5], [1, 4, 5]]])
    memory = KVMemory(model)
    model(tokens(1, 6), past_key_values=memory)
    for layer in range(2):
        memory.keep(layer, kept)
    question = tokens(1, 3, seed=3)
    single = [memory.fork() for _ in range(2)]
    first, second = (generate(model, question, **m.generate_kwargs(question), **GREEDY) for m in single)
    assert torch.equal(first, second)
    batch = memory.fork()
    several = generate(model, question, **batch.generate_kwargs(question), num_return_sequences=2, **SAMPLED)
    assert several.shape == (2, 11)
    # The same rows as if the memory had been repeated by hand.
    repeated = memory.fork()
    repeated.batch_repeat_interleave(2)
    twice = question.expand(2, -1)
    assert torch.equal(several, generate(model, twice, **repeated.generate_kwargs(twice), **SAMPLED))
    assert memory.layers[0].length == 3


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "opt", "mistral"])
def test_a_left_padded_batch_is_its_single_rows(family: str, attention: str) -> None:
    """Two turns, different lengths, different rows kept in each row and head, one row with fewer than the other."""
    model = tiny(family, attention)
    heads = 4 if family == "opt" else 2
    first, second = [tokens(5), tokens(9, seed=1)], [tokens(4, seed=2), tokens(2, seed=3)]
    generator = torch.Generator().manual_seed(5)
    keeps = [
        [
            torch.stack([torch.randperm(n, generator=generator)[:k].sort().values for _ in range(heads)])
            for _ in range(2)
        ]
        for n, k in ((5, 3), (9, 6))
    ]

    def run(rows: list[int]) -> tuple[torch.Tensor, KVMemory]:
        memory = KVMemory(model)
        ids, mask = left_padded([first[r] for r in rows])
        model(ids, **memory.forward_kwargs(ids, mask))
        for layer in range(2):
            width = max(keeps[r][layer].shape[1] for r in rows)
            indices = torch.full((len(rows), heads, width), -1)
            for i, r in enumerate(rows):
                kept = keeps[r][layer]
                indices[i, :, width - kept.shape[1] :] = kept + (ids.shape[1] - len(first[r]))
            memory.keep(layer, indices)
        ids, mask = left_padded([second[r] for r in rows])
        return generate(model, ids, **memory.generate_kwargs(ids, mask), **GREEDY)[:, ids.shape[1] :], memory

    both, memory = run([0, 1])
    for row in (0, 1):
        alone, single = run([row])
        assert torch.equal(both[row], alone[0])
        assert memory.next_position[row] == single.next_position[0]
        for ours, theirs in zip(memory.layers, single.layers):
            size = theirs.length
            assert torch.equal(ours.positions[row, :, -size:], theirs.positions[0])
            assert torch.allclose(ours.keys[row, :, -size:], theirs.keys[0], atol=1e-5)
            assert (ours.positions[row, :, :-size] == -1).all()
            assert (ours.keys[row, :, :-size] == 0).all()


def test_many_questions_to_one_memory() -> None:
    model, questions = tiny("llama"), [tokens(2, seed=5), tokens(5, seed=6), tokens(3, seed=7)]
    memory = KVMemory(model)
    model(tokens(1, 8), past_key_values=memory)
    memory.keep(0, torch.tensor([[[0, 2, 5], [-1, 4, 7]]]))
    memory.keep(1, torch.tensor([[[1, 6], [4, 7]]]))
    ids, mask = left_padded(questions)
    batch = memory.fork()
    together = generate(model, ids, **batch.generate_kwargs(ids, mask), **GREEDY)[:, ids.shape[1] :]
    for question, answer in zip(questions, together):
        single = memory.fork()
        alone = generate(model, question[None], **single.generate_kwargs(question[None]), **GREEDY)
        assert torch.equal(alone[0, len(question) :], answer)


def test_prefill_in_chunks() -> None:
    model, ids = tiny("llama"), tokens(1, 11)
    memory = KVMemory(model)
    memory2 = KVMemory(model)
    for m in (memory, memory2):
        model(tokens(1, 6, seed=4), past_key_values=m)
        for layer in range(2):
            m.keep(layer, torch.tensor([[[1, 3], [0, 5]]]))
    whole = generate(model, ids, **memory.generate_kwargs(ids), **GREEDY)
    assert torch.equal(whole, generate(model, ids, **memory2.generate_kwargs(ids), prefill_chunk_size=4, **GREEDY))
    assert torch.equal(memory.layers[0].positions, memory2.layers[0].positions)


def test_a_bare_forward_goes_on_at_the_next_position() -> None:
    """Without position ids, a plain cache would take the number of rows for the position."""
    model = tiny("llama")
    memory, other = KVMemory(model), KVMemory(model)
    for m in (memory, other):
        model(tokens(1, 6), past_key_values=m)
        m.keep(0, torch.tensor([[[0, 5], [1, 5]]]))
        m.keep(1, torch.tensor([[[0, 5], [1, 5]]]))
    new = tokens(1, 3, seed=1)
    bare = model(new, past_key_values=memory).logits
    assert torch.equal(bare, model(new, past_key_values=other, position_ids=torch.tensor([[6, 7, 8]])).logits)
    assert memory.layers[0].positions[0, 0].tolist() == [0, 5, 6, 7, 8]


def test_eviction_between_the_steps_of_generate() -> None:
    """Rows may go while generate runs: it keeps its own, longer mask, and the memory must not believe it."""
    from transformers import StoppingCriteria, StoppingCriteriaList

    model, rows = tiny("llama"), [tokens(5), tokens(9, seed=1)]

    class Trim(StoppingCriteria):
        def __init__(self, memory: KVMemory) -> None:
            self.memory = memory

        def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
            for layer, rows in enumerate(self.memory.layers):
                last = torch.arange(rows.length - 4, rows.length).expand(len(input_ids), 2, -1)
                self.memory.keep(layer, last)
            return torch.zeros(len(input_ids), dtype=torch.bool)

    def run(some: list[torch.Tensor]) -> torch.Tensor:
        memory = KVMemory(model)
        ids, mask = left_padded(some)
        criteria = StoppingCriteriaList([Trim(memory)])
        kwargs = memory.generate_kwargs(ids, mask)
        return generate(model, ids, **kwargs, stopping_criteria=criteria, **GREEDY)[:, ids.shape[1] :]

    both = run(rows)
    assert torch.equal(both[0], run(rows[:1])[0])
    assert torch.equal(both[1], run(rows[1:])[0])


def test_a_memory_of_another_model_is_refused() -> None:
    with pytest.raises(ValueError, match="the model it was made for"):
        KVMemory(tiny("llama")).update(torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 3, 8), 0)
    memory = KVMemory(tiny("llama"))
    tiny("llama")(tokens(2, 4), past_key_values=memory)
    with pytest.raises(ValueError, match="batch of 3"):
        memory.generate_kwargs(tokens(3, 2))
    with pytest.raises(ValueError, match="attention_mask"):
        memory.generate_kwargs(tokens(2, 2), torch.ones(2, 6))
