"""Decoding on fixed shapes gives what decoding on a growing memory gives, at constant addresses, compiled once."""

import functools
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from kvc.cache.memory import KVMemory
from kvc.cache.static import StaticMemory
from kvc.errors import UserError
from kvc.eviction.capacity import slots
from kvc.eviction.eviction import Eviction
from kvc.eviction.policy import Policy
from kvc.eviction.registry import POLICIES, make_policy
from kvc.eviction.triggers import BudgetBuffer, EveryTokens, NewlineIds, PrefillOnly, StepPhase, Trigger, UntilThinkEnd
from kvc.generation.decode import generate
from kvc.generation.output import Output
from kvc.generation.sampling import Greedy, Sampling
from kvc.generation.static import StaticStep

sys.path.insert(0, str(Path(__file__).parents[1] / "cache"))
from kv_models import FAMILIES, left_padded, tiny, tokens

BUDGET, BUFFER = 20, 6
TRIGGERS: dict[str, Trigger] = {"buffer": BudgetBuffer(BUFFER), "every": EveryTokens(5), "phase": StepPhase(7)}


def policy(name: str) -> Policy:
    """A policy that fits the small budget."""
    return make_policy(name, **({} if name in {"none", "streaming_llm", "tova"} else {"window": 4}))


def prompts() -> tuple[Tensor, Tensor]:
    """Three rows of different lengths, the longest beyond the budget after a few tokens."""
    return left_padded([tokens(5), tokens(19, seed=1), tokens(12, seed=2)])


class Spy(Greedy):
    """Notes logits, by row."""

    def reset(self, rows: int) -> None:
        self.logits: list[list[Tensor]] = [[] for _ in range(rows)]

    def __call__(self, logits: Tensor, rows: Any) -> Tensor:
        for row, own in zip(rows, logits.clone()):
            self.logits[row].append(own)
        return super().__call__(logits, rows)


class Watched(StaticStep):
    """Notes the addresses and shapes of all buffers, and the bytes, before every step."""

    def begin(self, model: PreTrainedModel, memory: StaticMemory) -> None:
        super().begin(model, memory)
        self.memory: StaticMemory | None = memory
        self.capacities = [layer.capacity for layer in memory.layers]
        self.states: list[Any] = []

    def __call__(self, tokens: Tensor) -> Tensor:
        memory = self._memory
        assert memory is not None
        buffers = [(part.data_ptr(), part.shape) for layer in memory.layers for part in layer.tensors()]
        recorder: Any = memory.tap
        if recorder is not None:
            buffers += [(ring._buffer.data_ptr(), ring._buffer.shape) for ring in recorder._rings or []]
        self.states.append((buffers, tokens.shape, memory.bytes))
        return super().__call__(tokens)


def decode(
    model: PreTrainedModel, compressor: Eviction | None, static: StaticStep | None, **kwargs: Any
) -> tuple[Output, Spy]:
    ids, mask = prompts()
    settings = {"max_new_tokens": 40, "eos_token_id": (), "sampler": Spy(), **kwargs}
    return generate(model, ids, mask, compressor=compressor, static=static, **settings), settings["sampler"]


def assert_same(ours: tuple[Output, Spy], theirs: tuple[Output, Spy]) -> None:
    (static, seen), (dynamic, expected) = ours, theirs
    assert static.tokens == dynamic.tokens
    assert static.finish == dynamic.finish
    assert static.compressions == dynamic.compressions
    for own, other in zip(seen.logits, expected.logits, strict=True):
        torch.testing.assert_close(torch.stack(own), torch.stack(other), atol=1e-5, rtol=0)
    for row in range(3):
        summaries = static.usage.summary(row), dynamic.usage.summary(row)
        for name in ("kv_tokens_peak", "kv_tokens_mean", "kv_tokens_final"):
            assert summaries[0][name] == summaries[1][name]
    assert torch.equal(static.memory.next_position, dynamic.memory.next_position)
    for own, other in zip(static.memory.layers, dynamic.memory.layers):
        assert torch.equal(own.positions, other.positions)
        torch.testing.assert_close(own.keys, other.keys, atol=1e-5, rtol=0)
        torch.testing.assert_close(own.values, other.values, atol=1e-5, rtol=0)


@pytest.mark.parametrize("trigger", TRIGGERS)
@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_decodes_the_same(name: str, trigger: str) -> None:
    """Rows of a left-padded batch are compressed at different times, each several times."""
    model = tiny("llama", "sdpa")
    arms = [decode(model, Eviction(policy(name), BUDGET, TRIGGERS[trigger]), s) for s in (Watched(), None)]
    assert_same(arms[0], arms[1])
    if name != "none":
        assert min(arms[0][0].compressions) >= 3
        assert len(set(arms[0][0].compressions)) > 1


@pytest.mark.parametrize("family", ["qwen2", "opt", "mistral", "gemma3", "phi3"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_every_family_decodes_the_same(family: str, attention: str) -> None:
    model = tiny(family, attention)
    arms = [decode(model, Eviction(policy("h2o"), BUDGET, BudgetBuffer(BUFFER)), s) for s in (Watched(), None)]
    assert_same(arms[0], arms[1])


def test_a_budget_below_the_window_of_the_model() -> None:
    """Few rows reach back beyond the window: those that lie outside are seen by neither."""
    config = AutoConfig.for_model(**{**FAMILIES["mistral"], "sliding_window": 16})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    arms = [decode(model, Eviction(policy("streaming_llm"), 8, BudgetBuffer(4)), s) for s in (Watched(), None)]
    assert_same(arms[0], arms[1])


@pytest.mark.parametrize("name", ["rkv", "h2o", "streaming_llm"])
def test_rows_end_at_different_times(name: str) -> None:
    model = tiny("llama", "sdpa")
    free, _ = decode(model, Eviction(policy(name), BUDGET, BudgetBuffer(BUFFER)), None)
    first, second, last = free.tokens
    # The first two rows end early, each by a token of its own; the last goes on alone.
    early = next(token for token in first[5:] if token not in last)
    ends = {early, next(token for token in second if token not in (*last, *second[:5], early))}
    arms = [
        decode(model, Eviction(policy(name), BUDGET, BudgetBuffer(BUFFER)), s, eos_token_id=ends)
        for s in (Watched(), None)
    ]
    assert arms[0][0].finish == ["eos", "eos", "length"]
    assert len({len(row) for row in arms[0][0].tokens}) == 3
    assert_same(arms[0], arms[1])
    assert arms[0][0].memory.next_position.shape == (1,)


def test_rows_that_end_together_stay_in_memory() -> None:
    model, (ids, mask) = tiny("llama", "sdpa"), prompts()
    ids, mask = ids[1:2].expand(2, -1), mask[1:2].expand(2, -1)
    free = generate(model, ids, mask, max_new_tokens=12, eos_token_id=())
    end = next(token for at, token in enumerate(free.tokens[0]) if at > 3 and token not in free.tokens[0][:at])
    arms = [generate(model, ids, mask, max_new_tokens=12, eos_token_id=end, static=s) for s in (StaticStep(), None)]
    assert arms[0].finish == ["eos", "eos"]
    assert torch.equal(arms[0].memory.next_position, arms[1].memory.next_position)
    assert torch.equal(arms[0].memory.layers[1].positions, arms[1].memory.layers[1].positions)


@pytest.mark.parametrize("name", ["rkv", "h2o"])
def test_nothing_moves_and_nothing_grows(name: str) -> None:
    step = Watched()
    output, _ = decode(tiny("llama", "sdpa"), Eviction(policy(name), BUDGET, BudgetBuffer(BUFFER)), step)
    assert len(step.states) == 39
    assert all(state == step.states[0] for state in step.states)
    assert step.capacities == [BUDGET + BUFFER] * 2
    mass = 4 if name == "h2o" else 0
    held = 2 * 3 * 2 * (BUDGET + BUFFER) * (2 * 8 * 4 + 4 + mass)
    assert step.states[0][2] == held
    assert output.usage.summary(0)["kv_bytes_final"] == held / 3


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_without_a_compressor_the_plain_models_tokens(attention: str) -> None:
    model, (ids, mask) = tiny("llama", attention), prompts()
    settings: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    plain = model.generate(ids, attention_mask=mask, max_new_tokens=20, **settings)[:, ids.shape[1] :]
    step = Watched()
    ours = generate(model, ids, mask, max_new_tokens=20, eos_token_id=(), static=step)
    assert ours.tokens == plain.tolist()
    # The last token is fed to nobody.
    assert step.capacities == [19 + 19] * 2
    assert generate(model, ids, mask, max_new_tokens=1, static=step).tokens == plain[:, :1].tolist()


def test_sampling_and_several_answers_to_one_prompt() -> None:
    model, (ids, mask) = tiny("llama", "sdpa"), prompts()
    arms = [
        generate(
            model,
            ids,
            mask,
            max_new_tokens=30,
            samples=2,
            sampler=Sampling(temperature=1.0, seed=3),
            eos_token_id=(),
            compressor=Eviction(policy("rkv"), BUDGET, BudgetBuffer(BUFFER)),
            static=static,
        )
        for static in (StaticStep(), None)
    ]
    assert arms[0].tokens == arms[1].tokens
    assert arms[0].compressions == arms[1].compressions


@pytest.mark.parametrize("trigger", TRIGGERS)
def test_budgets_that_differ_by_layer(trigger: str) -> None:
    model, step = tiny("llama", "sdpa"), Watched()
    arms = [decode(model, Eviction(policy("knorm"), [30, 12], TRIGGERS[trigger]), s) for s in (step, None)]
    assert_same(arms[0], arms[1])
    assert step.capacities[0] > step.capacities[1]


def test_the_callers_memory_goes_on_and_comes_back_after_an_error() -> None:
    model, (ids, mask) = tiny("llama", "sdpa"), prompts()
    memories = [KVMemory(model), KVMemory(model)]
    for memory, static in zip(memories, (StaticStep(), None)):
        for _ in range(2):
            eviction = Eviction(policy("snapkv"), BUDGET, BudgetBuffer(BUFFER))
            settings: dict[str, Any] = {"memory": memory, "compressor": eviction, "static": static}
            output = generate(model, ids, mask, max_new_tokens=15, eos_token_id=(), **settings)
            assert output.memory is memory
    assert torch.equal(memories[0].layers[1].positions, memories[1].layers[1].positions)

    class Broken(StaticStep):
        def __call__(self, tokens: Tensor) -> Tensor:
            raise RuntimeError("broken")

    memory = KVMemory(model)
    with pytest.raises(RuntimeError, match="broken"):
        generate(model, ids, mask, memory=memory, max_new_tokens=15, eos_token_id=(), static=Broken())
    assert memory.tokens.tolist() == [5, 19, 12]


# The bound on the number of slots


@pytest.mark.parametrize("budgets", [[20, 20], [30, 10], [10, 25, 13]])
@pytest.mark.parametrize("at_prefill", [True, False])
@pytest.mark.parametrize("length", [3, 12, 21, 28, 60])
@pytest.mark.parametrize("trigger", TRIGGERS)
def test_no_layer_outgrows_its_slots(trigger: str, length: int, at_prefill: bool, budgets: list[int]) -> None:
    """Against a decode of 200 tokens that is only counted; where all layers are alike the bound is reached."""
    mean = round(sum(budgets) / len(budgets))
    rule = {"buffer": BudgetBuffer(BUFFER, mean), "every": EveryTokens(5), "phase": StepPhase(7)}[trigger]
    from kvc.generation.protocols import Progress

    rule.at_prefill = at_prefill
    rows = [length] * len(budgets)

    def forward(seen: int) -> None:
        progress = Progress([seen], [round(sum(rows) / len(rows))], [0])
        if rule(progress)[0]:
            rows[:] = [min(row, budget) for row, budget in zip(rows, budgets)]

    forward(length)
    bound = slots(torch.tensor(rows)[:, None, None], budgets, rule)
    assert bound is not None
    peaks = list(rows)
    for seen in range(length + 1, length + 200):
        rows[:] = [row + 1 for row in rows]
        peaks = [max(pair) for pair in zip(peaks, rows)]
        forward(seen)
    assert all(peak <= limit for peak, limit in zip(peaks, bound))
    if len(set(budgets)) == 1 and trigger == "buffer":
        assert peaks == bound


def test_what_sets_no_bound() -> None:
    held = torch.full((2, 1, 1), 5)
    for trigger in (PrefillOnly(), NewlineIds([4]), UntilThinkEnd(EveryTokens(3), end_id=3)):
        assert slots(held, [20, 20], trigger) is None
    # Layers that differ for other reasons than their budgets.
    assert slots(torch.tensor([5, 9])[:, None, None], [20, 20], EveryTokens(3)) is None
    step = Watched()
    decode(tiny("llama", "sdpa"), Eviction(policy("knorm"), BUDGET, PrefillOnly()), step)
    assert step.capacities == [19 + 39] * 2


# Modes


def test_modes_that_cannot_be() -> None:
    model, (ids, mask) = tiny("llama", "sdpa"), prompts()
    with pytest.raises(UserError, match="mode: 'fast' is not one of"):
        StaticStep("fast")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="mode: 'graph' captures CUDA"):
        generate(model, ids, mask, max_new_tokens=5, static=StaticStep("graph"))
    with pytest.raises(UserError, match=r"storage: .* int4"):
        generate(model, ids, mask, max_new_tokens=5, memory=KVMemory(model, "int4"), static=StaticStep())


def compiled_once(name: str, family: str) -> None:
    """60 steps of two calls with prompts of other lengths are the dynamic ones, by code that is compiled once."""
    model, step = tiny(family, "sdpa"), StaticStep("compile")

    def run(static: StaticStep | None, seed: int, length: int) -> Output:
        ids, mask = left_padded([tokens(5, seed=seed), tokens(length, seed=seed + 1)])
        eviction = Eviction(policy(name), BUDGET, BudgetBuffer(BUFFER))
        return generate(model, ids, mask, max_new_tokens=60, eos_token_id=(), compressor=eviction, static=static)

    assert run(step, 0, 19).tokens == run(None, 0, 19).tokens
    with torch.compiler.set_stance("fail_on_recompile"):
        again = run(step, 5, 23)
    assert again.tokens == run(None, 5, 23).tokens
    assert min(again.compressions) >= 5


@pytest.mark.parametrize(("name", "family"), [("rkv", "llama"), ("h2o", "llama"), ("rkv", "gemma3"), ("h2o", "opt")])
def test_one_graph_holds_for_all_steps_and_calls(name: str, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced as for a compiler, and run without one, which is faster."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    counters = torch._dynamo.utils.counters["stats"]
    before = counters["unique_graphs"]
    compiled_once(name, family)
    assert counters["unique_graphs"] == before + 1


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="needs a C++ compiler")
def test_compiled_code_decodes_the_same() -> None:
    compiled_once("rkv", "llama")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["rkv", "h2o"])
def test_a_graph_replays_the_same_steps(name: str) -> None:
    import copy

    model, (ids, mask) = copy.deepcopy(tiny("llama", "sdpa")).cuda(), prompts()
    arms = [
        generate(
            model,
            ids.cuda(),
            mask.cuda(),
            max_new_tokens=40,
            eos_token_id=(),
            compressor=Eviction(policy(name), BUDGET, BudgetBuffer(BUFFER)),
            static=static,
        )
        for static in (StaticStep("graph"), StaticStep(), None)
    ]
    assert arms[0].tokens == arms[1].tokens == arms[2].tokens
    assert arms[0].compressions == arms[2].compressions
