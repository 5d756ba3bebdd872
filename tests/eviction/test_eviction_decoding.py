"""Eviction while decoding, for every policy: nothing to evict, padded batches, what stays, bytes, state, errors."""

import copy
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from kvc.cache.memory import KVMemory
from kvc.core.backbone import Backbone
from kvc.errors import UserError
from kvc.eviction.eviction import Eviction
from kvc.eviction.importance import causal_importance
from kvc.eviction.policy import Policy
from kvc.eviction.registry import POLICIES, make_policy
from kvc.eviction.triggers import (
    BudgetBuffer,
    EveryTokens,
    NewlineText,
    PrefillOnly,
    StepPhase,
    Trigger,
    UntilThinkEnd,
)
from kvc.generation.decode import generate
from kvc.generation.output import Output
from kvc.generation.protocols import Progress
from kvc.generation.sampling import Forced, Sampler
from tests.cache.kv_models import SHAPE, left_padded, tiny, tokens

WINDOW = 4
ORDERED = ("rkv", "snapkv", "snapkv_prefill", "h2o")


def policy(name: str, order: str = "time") -> Policy:
    settings: dict[str, Any] = {"window": WINDOW} if name in {*ORDERED, "knorm", "keydiff", "random"} else {}
    if name in ORDERED:
        settings["order"] = order
    return make_policy(name, **settings)


class Watched(Eviction):
    """Notes the positions in memory after every forward, by row of the batch."""

    def begin(self, model: Any, memory: KVMemory) -> None:
        super().begin(model, memory)
        self.seen: list[dict[int, list[list[list[int]]]]] = []

    def after(self, progress: Progress, alive: Sequence[int]) -> list[int]:
        shrunk = super().after(progress, alive)
        assert self._memory is not None
        layers = [layer.positions.tolist() for layer in self._memory.layers]
        kept = {
            row: [[[p for p in head if p >= 0] for head in layer[at]] for layer in layers]
            for at, row in enumerate(alive)
        }
        self.seen.append(kept)
        return shrunk


class Remember(Sampler):
    """Remembers the logits; feeds the given tokens `[rows, steps]`, or greedy ones."""

    def __init__(self, fed: torch.Tensor | None = None) -> None:
        self.fed = fed
        self.logits: list[dict[int, torch.Tensor]] = []

    def __call__(self, logits: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
        self.logits.append(dict(zip(rows, logits)))
        return logits.argmax(-1) if self.fed is None else self.fed[list(rows), len(self.logits) - 1]


def decode(
    model: Any, ids: torch.Tensor, mask: torch.Tensor | None, eviction: Any, new: int = 40, **more: Any
) -> Output:
    return generate(model, ids, mask, max_new_tokens=new, compressor=eviction, eos_token_id=(), **more)


@pytest.mark.parametrize("name", POLICIES)
def test_a_budget_that_is_never_reached_changes_nothing(name: str) -> None:
    model = tiny("llama")
    ids, mask = left_padded([tokens(9), tokens(17, seed=1)])
    full = decode(model, ids, mask, None)
    for trigger in (BudgetBuffer(8), EveryTokens(5), StepPhase(7)):
        output = decode(model, ids, mask, Eviction(policy(name), 17 + 40, trigger))
        assert output.tokens == full.tokens
        assert output.compressions == [0, 0]
        assert output.usage.summary(1) == pytest.approx(full.usage.summary(1), rel=1e-6) or name == "h2o"


def unlike(rows: int, length: int) -> torch.Tensor:
    """Rows without a token that comes twice: equal tokens have keys of equal norm, and rounding would decide."""
    generator = torch.Generator().manual_seed(5)
    return torch.stack([torch.randperm(61, generator=generator)[:length] + 3 for _ in range(rows)])


@pytest.mark.parametrize("fed", [True, False], ids=["fed", "greedy"])
@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("trigger", [BudgetBuffer(6), EveryTokens(5), StepPhase(7)], ids=lambda t: type(t).__name__)
def test_a_left_padded_batch_gives_what_its_rows_give_alone(name: str, trigger: Trigger, fed: bool) -> None:
    """Tokens, logits and what is kept; triggers fire at different times in the rows."""
    if name == "knorm" and not fed:
        pytest.skip("a random model repeats itself, and keys of equal norm are told apart by rounding only")
    model, new = tiny("llama"), 34
    sizes, texts = (9, 26, 4, 17), unlike(4, 61)
    rows = [text[:size] for text, size in zip(texts, sizes)]
    follow = torch.stack([text[size : size + new] for text, size in zip(texts, sizes)]) if fed else None
    ids, mask = left_padded(rows)
    together, watched = Remember(follow), Watched(policy(name), 16, trigger, prefix=2)
    output = decode(model, ids, mask, watched, new, sampler=together)
    for number, row in enumerate(rows):
        alone = Remember(None if follow is None else follow[number : number + 1])
        single = Watched(policy(name), 16, trigger, prefix=2)
        one = decode(model, row[None], None, single, new, sampler=alone)
        assert output.tokens[number] == one.tokens[0]
        assert output.compressions[number] == one.compressions[0]
        assert [kept[number] for kept in watched.seen] == [kept[0] for kept in single.seen]
        for ours, theirs in zip(together.logits, alone.logits):
            torch.testing.assert_close(ours[number], theirs[0], rtol=0, atol=2e-5)
            assert int(ours[number].argmax()) == int(theirs[0].argmax())
    if name != "none":
        assert min(output.compressions) >= 3
        assert len(set(output.compressions)) > 1


@pytest.mark.parametrize("name", ORDERED)
def test_short_prompts_on_a_continued_memory_score_as_they_do_alone(name: str) -> None:
    """Rows with fewer new tokens than the window have fewer queries than the row beside them."""
    model = tiny("llama")
    held = KVMemory(model)
    decode(model, tokens(2, 30, seed=7), None, None, 1, memory=held)
    rows = [tokens(2, seed=8), tokens(9, seed=9)]
    ids, mask = left_padded(rows)
    fed = tokens(2, 6, seed=10)
    together = Watched(policy(name), 16, EveryTokens(2))
    output = decode(model, ids, mask, together, 6, memory=held.fork(), sampler=Remember(fed))
    for number, row in enumerate(rows):
        alone, memory = Watched(policy(name), 16, EveryTokens(2)), held.fork()
        memory.batch_select_indices(torch.tensor([number]))
        one = decode(model, row[None], None, alone, 6, memory=memory, sampler=Remember(fed[number : number + 1]))
        assert [kept[number] for kept in together.seen] == [kept[0] for kept in alone.seen]
        assert output.compressions[number] == one.compressions[0] == 3


@pytest.mark.parametrize("family", ["llama", "opt", "granite"])
def test_queries_are_scored_as_the_model_scales_them(family: str) -> None:
    """OPT scales its queries before the product, Granite by a number of its own."""
    granite = AutoConfig.for_model("granite", **SHAPE, attention_multiplier=1.0)
    torch.manual_seed(0)
    model: Any = tiny(family, "eager") if family != "granite" else AutoModelForCausalLM.from_config(granite)
    model.eval().set_attn_implementation("eager")
    ids = tokens(1, 20)
    expected = model(ids, output_attentions=True).attentions
    eviction = Eviction(policy("snapkv_prefill"), 100)
    memory = KVMemory(model)
    eviction.begin(model, memory)
    model(ids, **memory.forward_kwargs(ids))
    for number, layer in enumerate(memory.layers):
        queries = eviction._recorder.queries(number) if eviction._recorder is not None else None
        assert queries is not None
        ours = causal_importance(queries, layer.keys, WINDOW).flatten(1, 2)
        torch.testing.assert_close(ours, expected[number][:, :, -WINDOW:, :-WINDOW].mean(2), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", [name for name in POLICIES if name != "none"])
def test_what_stays_is_bounded_exact_and_holds_the_window_and_the_prefix(name: str) -> None:
    model = tiny("qwen2")
    prompt, budget, prefix, buffer = 21, 14, 3, 5
    eviction = Watched(policy(name), budget, BudgetBuffer(buffer), prefix=prefix)
    output = decode(model, tokens(1, prompt), None, eviction)
    assert output.compressions == [1 + 39 // buffer]
    for step, kept in enumerate(eviction.seen):
        newest = prompt + step
        for layer in kept[0]:
            for head in layer:
                assert len(head) == budget + step % buffer
                assert len(set(head)) == len(head)
                assert head[:prefix] == list(range(prefix))
                window = eviction.policy.window
                assert head[-window:] == list(range(newest - window, newest))
    usage = output.usage.summary()
    assert usage["kv_tokens_peak"] == prompt
    assert usage["kv_tokens_final"] == budget + 39 % buffer


@pytest.mark.parametrize("name", [name for name in POLICIES if name != "none"])
def test_bytes_shrink_to_the_budget(name: str) -> None:
    """Keys, values and positions of the rows that are left, and nothing else but H2O's sums, which are counted."""
    model, budget = tiny("llama"), 12
    sizes: list[tuple[int, int]] = []

    class Weighed(Watched):
        def after(self, progress: Progress, alive: Sequence[int]) -> list[int]:
            shrunk = super().after(progress, alive)
            assert self._memory is not None
            if shrunk:
                sizes.append((self._memory.layers[0].length, self._memory.bytes))
            return shrunk

    decode(model, tokens(3, 30), None, Weighed(policy(name), budget, BudgetBuffer(8)))
    assert len(sizes) == 1 + 39 // 8
    layers, batch, heads, width = 2, 3, 2, 8
    beside = 4 + (4 if name == "h2o" else 0)
    for length, held in sizes:
        assert length == budget
        assert held == layers * batch * heads * budget * (2 * width * 4 + beside)


@pytest.mark.parametrize("name", [name for name in POLICIES if name != "none"])
def test_evicted_rows_can_no_longer_change_anything(name: str) -> None:
    """What was evicted is poisoned in the tensors that it came from; the answers stay."""
    model, ids = tiny("llama"), tokens(1, 24)

    def run(poison: bool) -> list[torch.Tensor]:
        class Poisoned(Watched):
            def after(self, progress: Progress, alive: Sequence[int]) -> list[int]:
                assert self._memory is not None
                before = [part for layer in self._memory.layers for part in (layer.keys, layer.values)]
                shrunk = super().after(progress, alive)
                if shrunk and poison:
                    for part in before:
                        part.fill_(torch.nan)
                return shrunk

        remember = Remember(tokens(1, 20, seed=3))
        decode(model, ids, None, Poisoned(policy(name), 12, BudgetBuffer(4)), new=20, sampler=remember)
        return [logits[0] for logits in remember.logits]

    for ours, theirs in zip(run(poison=True), run(poison=False)):
        assert torch.equal(ours, theirs)


def test_score_order_of_a_memory_that_is_exactly_full_is_no_eviction() -> None:
    model = tiny("llama")
    output = decode(model, tokens(1, 12), None, Eviction(policy("rkv", "score"), 12, PrefillOnly()), new=3)
    assert output.compressions == [0]


@pytest.mark.parametrize("name", POLICIES)
def test_layers_rated_together_keep_what_they_keep_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, (ids, mask) = tiny("llama"), left_padded([tokens(9), tokens(26, seed=1), tokens(17, seed=2)])
    fed = torch.stack([tokens(24, seed=seed) for seed in (5, 6, 7)])
    asked: list[int] = []

    class Asked(Watched):
        def _groups(self, *args: Any) -> list[list[int]]:
            groups = super()._groups(*args)
            asked.extend(map(len, groups))
            return groups

    def run() -> list[dict[int, list[list[list[int]]]]]:
        asked.clear()
        eviction = Asked(policy(name), 12, BudgetBuffer(5), prefix=2)
        decode(model, ids, mask, eviction, new=24, sampler=Remember(fed))
        return eviction.seen

    together = run()
    assert set(asked) == {2}
    monkeypatch.setattr("kvc.eviction.eviction.TOGETHER", 0)
    alone = run()
    assert set(asked) == {1}
    assert together == alone


def test_state_is_forgotten_between_calls() -> None:
    model, ids = tiny("llama"), tokens(1, 19)
    for name in ("rkv", "h2o", "random"):
        eviction = Eviction(policy(name), 12, StepPhase(7))
        first = decode(model, ids, None, eviction)
        decode(model, tokens(2, 11, seed=4), None, eviction)
        again = decode(model, ids, None, eviction)
        assert first.tokens == again.tokens
        assert first.memory.tap is None


def test_layers_may_have_budgets_of_their_own() -> None:
    model, ids = tiny("llama"), tokens(2, 30)
    listed = decode(model, ids, None, Eviction(policy("rkv"), [20, 10], PrefillOnly()), new=4)
    assert [layer.length for layer in listed.memory.layers] == [23, 13]
    shared = decode(model, ids, None, Eviction(policy("snapkv"), 15, PrefillOnly(), beta=20), new=4)
    lengths = [layer.length - 3 for layer in shared.memory.layers]
    assert sum(lengths) == 30
    assert lengths[0] > lengths[1] > WINDOW


@pytest.mark.parametrize("name", POLICIES)
def test_every_layer_of_a_pyramid_has_a_budget_that_its_policy_takes(name: str) -> None:
    for prefix in (0, 9):
        eviction = Eviction(policy(name), 24, prefix=prefix, beta=20)
        for budget in eviction.budgets(4):
            eviction.policy.check(budget, prefix)


def test_a_trigger_reads_text() -> None:
    backbone = Backbone()
    model, tokenizer = backbone.load().eval(), backbone.load_tokenizer()
    text = "5 + 4 = 9.\n2 + 2 = 4.\n</think>\n1 + 1 = 2.\n3"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    prompt = torch.tensor([tokenizer("Question: Ida has 5 keys.\nSolution:\n" * 3)["input_ids"]])
    eviction = Watched(policy("knorm"), 12, UntilThinkEnd(NewlineText()))
    generate(
        model, prompt, max_new_tokens=len(ids), sampler=Forced([ids]), compressor=eviction, tokenizer=tokenizer,
        eos_token_id=(),
    )  # fmt: skip
    lengths = [len(kept[0][0][0]) for kept in eviction.seen]
    fired = [step for step, (a, b) in enumerate(pairwise(lengths), start=1) if b <= a]
    ends = [step for step in range(1, len(ids)) if tokenizer.decode(ids[:step]).endswith("\n")]
    before = [step for step in ends if "</think>" not in tokenizer.decode(ids[:step])]
    assert fired == before
    assert len(fired) == 2
    with pytest.raises(UserError, match="needs a tokenizer"):
        generate(model, prompt, max_new_tokens=3, compressor=eviction)


def test_debug_lines(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RKV_DEBUG_COMPRESSION", "1")
    decode(tiny("llama"), tokens(1, 20), None, Eviction(policy("rkv"), 12, BudgetBuffer(4)), new=6)
    lines = capsys.readouterr().err.splitlines()
    form = "[R1KV][layer {}] compressed cache {} -> 12 (rotated=False, rotation_offset=n/a, next_pos={})"
    assert lines == [form.format(layer, *step) for step in ((20, 20), (16, 24)) for layer in (0, 1)]


def test_bad_settings() -> None:
    with pytest.raises(UserError, match=r"budget: RKV needs more than 12 tokens \(window 8 \+ prefix 4\), got 12"):
        Eviction(make_policy("rkv"), 12, prefix=4)
    with pytest.raises(UserError, match="policy: there is none named 'rvk'"):
        make_policy("rvk")
    with pytest.raises(UserError, match="3 budgets do not fit the 2 layers"):
        decode(tiny("llama"), tokens(1, 9), None, Eviction(policy("rkv"), [20, 10, 10]), new=2)
    with pytest.raises(UserError, match="leaves nothing for beta"):
        Eviction(policy("rkv"), [20, 10], beta=2.0)
    model = copy.deepcopy(tiny("llama"))
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(UserError, match="nobody can see the queries of 'flash_attention_2' attention"):
        decode(model, tokens(1, 9), None, Eviction(policy("rkv"), 12), new=2)
