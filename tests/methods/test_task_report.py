"""Teacher-forced arms: what each may see, and what its numbers mean."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvc.data.synthetic.base import Segment
from kvc.data.synthetic.example import Example, Turn, text_chunks
from kvc.data.synthetic.tasks import TASKS, example
from kvc.methods.lm.arms import ARMS, ORACLE_ARMS, ORACLE_RECENT, RECENT, SHORTCUT, WINDOW
from kvc.methods.lm.picture import arms_by_task
from kvc.methods.lm.summary import summarize_arms
from kvc.methods.lm.teacher_forcing import _batches, _outcome, _view, encode, score


@pytest.fixture(scope="module")
def tokenizer(tiny_folder):
    return AutoTokenizer.from_pretrained(tiny_folder)


@pytest.fixture(scope="module")
def model(tiny_folder):
    return AutoModelForCausalLM.from_pretrained(tiny_folder).eval()


def view_of(tokenizer, items, seed=0):
    rows = [encode(tokenizer, item) for item in items]
    return rows, *_view(rows, [(seed, i) for i in range(len(rows))], torch.device("cpu"))


SOME = [("reasoning", "2-4"), ("passages", "4-8"), ("in_context", "8"), ("dialogue", "5-8"), ("study", "2-3")]


@pytest.mark.parametrize(("task", "level"), SOME)
@torch.no_grad()
def test_full_context_is_the_plain_model(model, tokenizer, task, level):
    items = [example(task, "test", 0, i, level) for i in range(5)]
    for item, scores in zip(items, score(model, tokenizer, items, range(5), 0)):
        row = encode(tokenizer, item)
        logits = model(torch.tensor([row.ids])).logits[0, :-1].log_softmax(-1)
        targets = torch.tensor(row.ids[1:])
        nll = -logits.gather(1, targets[:, None])[:, 0]
        answer, graded = torch.tensor(row.answer[1:]), torch.tensor(row.graded[1:])
        full = scores["full"]
        assert full.nll == pytest.approx(float(nll[answer].sum()), rel=1e-5)
        assert full.right == int((logits.argmax(-1) == targets)[graded].sum())
        assert (full.tokens, full.graded) == (int(answer.sum()), int(graded.sum()))
        assert full.kept == 1.0


@torch.no_grad()
def test_a_batch_scores_like_its_rows(model, tokenizer):
    items = [example(task, "test", 0, i, level) for task, level in SOME for i in range(3)]
    together = score(model, tokenizer, items, range(len(items)), 7)
    for i, item in enumerate(items):
        (alone,) = score(model, tokenizer, [item], [i], 7)
        assert alone.keys() == together[i].keys()
        for arm, outcome in alone.items():
            assert outcome == pytest.approx(together[i][arm], rel=1e-4)


@pytest.mark.parametrize("arm", [*ARMS, *ORACLE_ARMS])
def test_what_each_arm_sees(tokenizer, arm):
    items = [example("reasoning", "test", 0, i, "5-8") for i in range(3)]
    rows, view, layout = view_of(tokenizer, items)
    visible = (ARMS | ORACLE_ARMS)[arm](view) & view.seen
    for number, row in enumerate(rows):
        start = layout.context - row.context
        generator = view.coin[number]
        for query in range(row.context, len(row.ids)):
            kept = {
                key
                for key in range(query + 1)
                if key == 0
                or {
                    "full": True,
                    f"window {WINDOW}": query - key < WINDOW,
                    "random 75%": query - key < RECENT or generator[start + key] < 0.75,
                    "random 50%": query - key < RECENT or generator[start + key] < 0.5,
                    "random 25%": query - key < RECENT or generator[start + key] < 0.25,
                    "no context": key >= row.context,
                    "oracle": query - key < ORACLE_RECENT or query < row.until[key],
                    "window like oracle": None,
                }[arm]
            }
            if arm == "window like oracle":
                size = sum(
                    key == 0 or query - key < ORACLE_RECENT or query < row.until[key] for key in range(query + 1)
                )
                kept = {0, *range(query - size + 2, query + 1)}
            seen = visible[number, query - row.context].nonzero().flatten() - start
            assert set(seen.tolist()) == kept


def test_random_eviction_is_nested_and_keeps_its_share(tokenizer):
    items = [example("passages", "test", 0, i, "17-30") for i in range(40)]
    _, view, _ = view_of(tokenizer, items)
    old = view.context[:, None] & (view.distance >= RECENT) & view.seen & ~view.sink[:, None]
    kept = {share: ARMS[f"random {share}%"](view) & old for share in (25, 50, 75)}
    assert not (kept[25] & ~kept[50]).any()
    assert not (kept[50] & ~kept[75]).any()
    for share, mask in kept.items():
        assert float(mask.sum() / old.sum()) == pytest.approx(share / 100, abs=0.02)


@torch.no_grad()
def test_dropped_context_can_change_nothing(model, tokenizer):
    def passage(place):
        return Example(
            "Passage: ",
            text_chunks(f"Emma lives in {place}. Karl lives in {place}. Noah lives in Oslo."),
            (Turn("\nQuestion: Where does Emma live?", "\nAnswer:", (Segment(" Paris", "answer"),)),),
            "Paris",
        )

    here, there = score(model, tokenizer, [passage("Paris"), passage("Berlin")], [0, 0], 0)
    assert here["no context"] == pytest.approx(there["no context"], rel=1e-6)
    assert here["full"].nll != pytest.approx(there["full"].nll, rel=1e-3)


def test_a_step_is_right_when_all_its_numbers_are(tokenizer):
    row = encode(tokenizer, example("reasoning", "test", 0, 0, "5-8"))
    first = row.context + 1
    count = len(row.ids) - first
    ones = torch.ones(count)

    def outcome(*wrong):
        hit = torch.ones(count, dtype=torch.bool)
        hit[[position - first for position in wrong]] = False
        return _outcome(row, hit, ones, ones)

    graded = [i for i, value in enumerate(row.graded) if value]
    plain = [i for i in range(first, len(row.ids)) if row.answer[i] and not row.graded[i]]
    second = [i for i in graded if row.steps[0] <= i < row.steps[1]]
    last = [i for i in graded if i >= row.steps[-1]]
    steps = len(row.steps)
    assert 5 <= steps <= 8
    assert outcome().exact
    assert outcome().steps_right == steps
    assert outcome(plain[3]).exact, "the layout of a solution is free"
    assert (outcome(second[0]).steps_right, outcome(second[0]).exact) == (steps - 1, False)
    assert outcome(*second).steps_right == steps - 1
    assert outcome(*second).right == len(graded) - len(second)
    assert outcome(graded[0], second[-1]).steps_right == steps - 2
    assert (outcome(*last).steps_right, outcome(*last).exact) == (steps, False)
    assert outcome().nll == sum(row.answer)


def test_oracle_arms_need_lifetimes(model, tokenizer):
    items = [example("passages", "test", 0, 0, "4-8"), example("reasoning", "test", 0, 0, "2-4")]
    passages, reasoning = score(model, tokenizer, items, [0, 1], 0)
    assert set(passages) == set(ARMS)
    assert set(reasoning) == {*ARMS, *ORACLE_ARMS}


def test_batches_hold_similar_rows_and_each_once(tokenizer):
    items = [example(task, "test", 0, i, level) for task, level in SOME for i in range(20)]
    rows = [encode(tokenizer, item) for item in items]
    batches = list(_batches(rows))
    assert sorted(i for batch in batches for i in batch) == list(range(len(rows)))
    for batch in batches:
        assert len({any(rows[i].until) for i in batch}) == 1


def record(i, level, exact, random, shortcut=None):
    def fields(value):
        return {
            "exact": value,
            "right": 2 * value,
            "graded": 2,
            "steps_right": int(value),
            "steps": 1,
            "nll": 1.0 if value else 3.0,
            "tokens": 4,
            "kept": 1.0 if value else 0.5,
        }

    arms = {"full": fields(exact), "random 50%": fields(random)}
    if shortcut is not None:
        arms[SHORTCUT] = {"exact": shortcut}
    return {"id": i, "task": "passages", "level": level, "gold": "x", "arms": arms, "correct": exact}


def test_summary_by_task_and_level():
    records = [record(i, "4-8" if i < 50 else "9-16", i % 10 > 0, i % 2 > 0, i % 4 == 0) for i in range(100)]
    summary = summarize_arms(records, 0)
    assert summary.metrics["exact_match/passages"].value == pytest.approx(0.9)
    assert summary.metrics["exact_match/passages_4-8"].n == 50
    assert summary.metrics["greedy/passages"].value == pytest.approx(0.9)
    assert summary.metrics["perplexity/passages"].value == pytest.approx(np.exp((90 + 30) / 400))
    assert summary.arms["random 50%"]["token_accuracy/passages"].value == pytest.approx(0.5)
    assert summary.arms["random 50%"]["kept/passages"].value == pytest.approx(0.75)
    assert summary.arms[SHORTCUT]["exact_match/passages"].value == pytest.approx(0.25)
    assert "perplexity/passages" not in summary.arms[SHORTCUT]
    difference = summary.differences["exact_match/passages"]["random 50%"]
    assert difference.value == pytest.approx(0.4)
    assert difference.low < 0.4 < difference.high
    assert SHORTCUT not in summary.differences["exact_match/passages"]
    better = summary.differences["perplexity/passages"]["random 50%"]
    assert better.value < 0
    assert better.high < 0


def test_picture_has_a_panel_for_each_task_and_a_line_for_each_level():
    records = [record(i, "4-8" if i < 20 else "9-16", i % 3 > 0, i % 2 > 0) for i in range(40)]
    for r in records:
        r["arms"] |= dict.fromkeys(ARMS, r["arms"]["full"])
    figure = arms_by_task(summarize_arms(records, 0), {"passages": ["4-8", "9-16"]})
    (axis,) = [axis for axis in figure.axes if axis.get_visible()]
    assert axis.get_title() == "passages"
    assert axis.get_ylabel() == "exact match"
    assert [text.get_text() for text in axis.get_xticklabels()] == list(ARMS)
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["4-8", "9-16"]


def test_every_task_has_an_answer_to_grade(tokenizer):
    for task in TASKS.values():
        for level in task.levels[:2]:
            row = encode(tokenizer, example(task.name, "test", 0, 0, level.name))
            assert any(row.graded)
            assert all(answer for answer, graded in zip(row.answer, row.graded) if graded)
            assert 1 < row.context < len(row.ids)
