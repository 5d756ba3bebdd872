"""Scores of SQuAD by the official rules; ratios, baselines and the alarm beside them."""

import pytest
import torch

from kvc.data.squad.example import SquadExample, unanswerable
from kvc.data.squad.grading import answer_text, diversity, normalised, score
from kvc.data.squad.question import SquadQuestion
from kvc.data.squad.ratios import keep_tokens, ratios


@pytest.mark.parametrize(
    ("prediction", "golds", "em", "f1"),
    [
        ("Paris", ["Paris"], True, 1.0),
        ("the Paris", ["paris"], True, 1.0),
        ("PARIS!", ["Paris"], True, 1.0),
        ("  a   cat\tand an owl ", ["cat and owl"], True, 1.0),
        # Punctuation goes without leaving a blank; an article inside a word stays.
        ("state-of-the-art", ["stateoftheart"], True, 1.0),
        ("theatre", ["atre"], False, 0.0),
        ("U.S. Supreme Court", ["US Supreme Court"], True, 1.0),
        # Words count with repetition: 2 of 3 and 2 of 2.
        ("no no no", ["no no"], False, 0.8),
        ("in the city of Paris", ["Paris"], False, 2 * (1 / 4) * 1 / (1 / 4 + 1)),
        # The best gold answer counts for each measure.
        ("New York City", ["York", "New York"], False, 0.8),
        ("York", ["New York City", "York"], True, 1.0),
        # Only ASCII punctuation is dropped.
        ("1990\u20131995", ["19901995"], False, 0.0),
        ("", ["Paris"], False, 0.0),
        ("the", ["Paris"], False, 0.0),
        ("", [""], True, 1.0),
        # An article alone normalises to nothing.
        ("the", [""], True, 1.0),
        ("Paris", [""], False, 0.0),
    ],
)
def test_official_rules(prediction: str, golds: list[str], em: bool, f1: float) -> None:
    found = score(prediction, golds)
    assert found.em == em
    assert found.f1 == pytest.approx(f1, abs=1e-6)


def test_completions_are_cut_to_their_first_line() -> None:
    assert answer_text(" Rome\nQuestion: more") == "Rome"
    assert answer_text("\n Rome ") == "Rome"
    assert answer_text("") == ""


def test_questions_judge_completions() -> None:
    asked = SquadQuestion(3, "p", None, SquadExample("k", "It is in Rome.", "q", ("Rome", "in Rome"), (9, 6)), None)
    assert (asked.gold, asked.group) == ("Rome", "answerable")
    assert asked.judge(" Rome.\nQuestion: and").correct
    assert asked.judge(" in Rome").answer == "in Rome"
    assert not asked.judge(" unknown").correct
    none = SquadQuestion(4, "p", None, unanswerable("k", "c", "q"), "unknown")
    assert none.group == "unanswerable"
    assert none.judge(" Unknown.\n").correct
    assert none.judge("").correct
    assert not none.judge(" Rome").correct
    # Where every question has an answer, it is a word as any other.
    assert (
        SquadQuestion(5, "p", None, SquadExample("k", "unknown", "q", ("unknown",), (0,)), None)
        .judge("unknown")
        .correct
    )


def test_the_alarm_rings_for_constant_answers_only() -> None:
    golds = [f"city {i % 8}" for i in range(40)]
    constant = diversity(["Rome"] * 40, golds)
    assert (constant.predicted, constant.gold, constant.collapsed) == (1 / 40, 8 / 40, True)
    assert not diversity(golds, golds).collapsed
    # Few different answers are right where few are asked for.
    assert not diversity(["yes", "no"] * 20, ["yes", "no"] * 20).collapsed
    assert diversity(["yes"] * 40, ["yes", "no"] * 20).collapsed
    assert diversity(["Rome", "ROME "] * 20, golds).collapsed
    assert diversity(["a", "b"] * 20, [str(i) for i in range(40)]).collapsed
    assert not diversity(["x"] * 3, ["x"] * 3).collapsed
    assert not diversity([], []).collapsed


def test_normalised_scores() -> None:
    assert normalised(0.5, 0.2, 0.8) == pytest.approx(0.5)
    assert normalised(0.9, 0.2, 0.8) == pytest.approx(7 / 6)
    assert normalised(0.5, 0.5, 0.5) is None


def test_real_ratios() -> None:
    found = ratios([512, 128, 32], [64, 64, 64], 512)
    assert found.nominal == 8
    assert found.mean == pytest.approx((8 + 2 + 0.5) / 3)
    assert found.total == pytest.approx(672 / 192)
    assert found.expanded == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match="at least one text"):
        ratios([], [], 512)


def test_truncated_baselines() -> None:
    ids = list(range(100, 150))
    assert keep_tokens(ids, 3, "first") == [100, 101, 102]
    assert keep_tokens(ids, 3, "last") == [147, 148, 149]
    chosen = keep_tokens(ids, 20, "random", torch.Generator().manual_seed(0))
    assert len(set(chosen)) == 20
    assert chosen == sorted(chosen)
    assert chosen == keep_tokens(ids, 20, "random", torch.Generator().manual_seed(0))
    assert chosen != keep_tokens(ids, 20, "random", torch.Generator().manual_seed(1))
    for keep in ("first", "last", "random"):
        assert keep_tokens(ids, 50, keep) == ids  # type: ignore[arg-type]
