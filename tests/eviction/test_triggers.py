"""When to compress: rules, their state, and its reset."""

import pytest

from kvc.errors import UserError
from kvc.eviction.triggers import (
    BudgetBuffer,
    EveryTokens,
    NewlineIds,
    NewlineText,
    PrefillOnly,
    StepPhase,
    Trigger,
    UntilThinkEnd,
)
from kvc.generation.protocols import Progress


def run(trigger: Trigger, prompt: int, forwards: int) -> list[int]:
    """Forwards after which one row compresses; 0 is the prefill."""
    trigger.reset()
    return [n for n in range(forwards) if trigger(Progress([prompt + n], [prompt + n], [5], ["x"]))[0]]


def feed(trigger: Trigger, texts: list[str]) -> list[int]:
    """Forwards after which a text that grows by these pieces compresses."""
    trigger.reset()
    fired, whole = [], ""
    for number, piece in enumerate(texts):
        whole += piece if number else ""  # the first is the prompt
        if trigger(Progress([number], [number], [len(piece)], [whole[-12:]]))[0]:
            fired.append(number)
    return fired


def test_step_phase_is_that_of_the_original() -> None:
    """Prompt 40, divide 32: compressions in decode forwards 25, 57, 89 (one after the count divides evenly)."""
    assert run(StepPhase(32), 40, 100) == [0, 25, 57, 89]
    assert run(StepPhase(16), 100, 50) == [0, 13, 29, 45]
    assert run(StepPhase(32), 64, 40) == [0, 1, 33]
    assert run(StepPhase(32, at_prefill=False), 40, 60) == [25, 57]


def test_every_tokens_counts_from_the_end_of_the_prompt() -> None:
    for prompt in (7, 40, 64):
        assert run(EveryTokens(10), prompt, 35) == [0, 10, 20, 30]


def test_prefill_only() -> None:
    assert run(PrefillOnly(), 40, 300) == [0]


def test_budget_and_buffer_by_rows_in_memory() -> None:
    trigger = BudgetBuffer(16, 48, at_prefill=False)
    cached, fired = 20, []
    for number in range(100):
        if trigger(Progress([20 + number], [cached], [5]))[0]:
            fired.append(number)
            cached = 48
        cached += 1
    assert fired == [44, 60, 76, 92]


def test_rows_decide_for_themselves() -> None:
    trigger = NewlineIds({13, 198})
    assert trigger(Progress([5, 9], [5, 9], [1, 1])) == [True, True]
    assert trigger(Progress([6, 10], [6, 10], [13, 1])) == [True, False]
    assert trigger(Progress([7, 11], [7, 11], [2, 198])) == [False, True]
    phase = StepPhase(4)
    phase(Progress([3, 2], [3, 2], [1, 1]))
    assert phase(Progress([4, 3], [4, 3], [1, 1])) == [False, False]
    assert phase(Progress([5, 4], [5, 4], [1, 1])) == [True, False]
    assert phase(Progress([6, 5], [6, 5], [1, 1])) == [False, True]


def test_newline_text_straddles_tokens_and_counts_once() -> None:
    assert feed(NewlineText(), ["prompt", "a", ".\n", "\n", "b", " c\n  ", "d"]) == [0, 2, 5]
    assert feed(NewlineText(["---"], at_prefill=False), ["x", "-", "-", "--", " ", "y", "---"]) == [3, 6]
    assert feed(NewlineText(["---"], at_prefill=False), ["a", "--", "b", "-"]) == []


def test_a_prompt_that_ends_a_line_does_not_hide_the_next() -> None:
    trigger = NewlineText(at_prefill=False)
    assert feed(trigger, ["a\n", "b", "\n"]) == [2]


def test_thinking_may_end() -> None:
    by_id = UntilThinkEnd(NewlineIds({13}), end_id=99)
    tokens = [1, 13, 99, 13, 13]
    assert [by_id(Progress([n], [n], [t]))[0] for n, t in enumerate(tokens)] == [True, True, False, False, False]
    counted = UntilThinkEnd(EveryTokens(3), end_id=99)
    assert run(counted, 6, 8) == run(counted, 7, 8) == [0, 3, 6], "the inner count starts anew too"
    by_text = UntilThinkEnd(NewlineText())
    texts = ["</think> old", "a\n", "b", "\n", "</th", "ink>", "\n", "c", "\n"]
    assert feed(by_text, texts)[:3] == [0, 1, 3]
    assert feed(by_text, texts) == [0, 1, 3]


@pytest.mark.parametrize(
    "trigger",
    [
        StepPhase(4),
        EveryTokens(4),
        NewlineText(),
        BudgetBuffer(4, 4),
        NewlineIds([5]),
        PrefillOnly(),
        UntilThinkEnd(EveryTokens(3), end_id=4),
    ],
    ids=lambda trigger: type(trigger).__name__,
)
def test_reset_forgets_everything(trigger: Trigger) -> None:
    def play(start: int) -> list[bool]:
        tokens = [1, 5, 2, 4, 5, 5, 3, 1, 1, 5]
        tails = ["a", "a\n", "b", "</think>", "\n", "\n", "c", "d", "\n", "e"]
        return [
            trigger(Progress([start + n], [n], [token], [tail]))[0]
            for n, (token, tail) in enumerate(zip(tokens, tails, strict=True))
        ]

    trigger.reset()
    first = play(6)
    trigger.reset()
    assert play(6) == first
    trigger.reset()
    trigger(Progress([3], [3], [4], ["\n"]))
    trigger.reset()
    assert play(6) == first


def test_bad_settings_of_triggers() -> None:
    for build in (
        lambda: StepPhase(0),
        lambda: EveryTokens(-1),
        lambda: BudgetBuffer(4, 0),
        lambda: BudgetBuffer(0),
        lambda: NewlineIds([]),
        lambda: NewlineText([]),
        lambda: NewlineText("---"),
        lambda: NewlineText([""]),
    ):
        with pytest.raises(UserError):
            build()
    with pytest.raises(UserError, match="tokenizer"):
        NewlineText()(Progress([1], [1], [1]))
