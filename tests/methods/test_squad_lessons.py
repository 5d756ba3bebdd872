"""Lessons: texts that grow, slots that become fewer, and never an answer that is cut away."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from squad_tiny import batch, method, squad

from kvc.errors import UserError
from kvc.methods.squad import FixedRatio, FixedSlots, Lessons, MeanPool, Source
from kvc.methods.squad.lessons import Eased
from kvc.methods.squad.losses import OnPolicyKd, TeacherForcing


def contexts(*rows: tuple[int, tuple[int, int]]) -> dict[str, Any]:
    """Contexts 100, 101, ... of so many tokens, with the places of their answers."""
    width = max(length for length, _ in rows)
    mask = torch.arange(width) < torch.tensor([length for length, _ in rows])[:, None]
    return {
        "context_ids": (torch.arange(width) + 100) * mask,
        "context_mask": mask,
        "span": torch.tensor([span for _, span in rows]),
    }


@pytest.mark.parametrize("span", [(0, 1), (3, 5), (17, 19), (29, 30)])
def test_a_short_context_holds_the_answer_and_what_stands_around_it(span: tuple[int, int]) -> None:
    lessons, starts = Lessons(first=10, last=40, grown=0.5, around=2), set()
    for seed in range(40):
        torch.manual_seed(seed)
        cut = lessons.shortened(contexts((30, span), (6, (2, 3))), 0.0)
        row, mask = cut["context_ids"][0], cut["context_mask"][0]
        assert mask.sum() == 10
        first = int(row[0]) - 100
        assert row.tolist() == list(range(100 + first, 110 + first))
        assert first <= max(0, span[0] - 2)
        assert min(30, span[1] + 2) <= first + 10
        assert (cut["span"][0] + first).tolist() == list(span)
        # A context that is short enough stays.
        assert cut["context_ids"][1][cut["context_mask"][1]].tolist() == list(range(100, 106))
        assert cut["span"][1].tolist() == [2, 3]
        starts.add(first)
    lowest, highest = max(0, min(30, span[1] + 2) - 10), min(max(0, span[0] - 2), 20)
    assert starts == set(range(lowest, highest + 1))


def test_an_answer_longer_than_the_lesson_stays_whole() -> None:
    cut = Lessons(first=4, last=40, around=1).shortened(contexts((30, (10, 18)), (30, (-1, -1))), 0.0)
    assert cut["context_mask"].sum(1).tolist() == [10, 4]
    assert cut["context_ids"][0].tolist() == list(range(109, 119))
    assert cut["span"].tolist() == [[1, 9], [-1, -1]]
    assert not cut["context_ids"][1][4:].any()


def test_contexts_grow_and_are_whole_in_the_end() -> None:
    lessons = Lessons(first=10, last=30, grown=0.5)
    assert [lessons.length(share) for share in (0.0, 0.25, 0.49, 0.5, 1.0)] == [10, 20, 30, None, None]
    given = contexts((30, (3, 4)))
    assert lessons.shortened(given, 0.5) is given
    assert Lessons(grown=0.0).shortened(given, 0.0) is given


def test_a_slot_for_each_token_at_first_and_the_budget_in_the_end() -> None:
    lessons, lengths = Lessons(hold=0.1, eased=0.6), torch.tensor([64, 16, 0])
    for budget, half in ((FixedRatio(16), [16, 4, 0]), (FixedSlots(4), [16, 8, 0])):
        for share, expected in ((0.0, [64, 16, 0]), (0.1, [64, 16, 0]), (0.35, half)):
            eased = lessons.budget(budget, share, None)
            assert eased.counts(lengths).tolist() == expected, (budget, share)
            assert eased.width(eased.counts(lengths)) == max(expected)
        assert lessons.budget(budget, 0.6, None) is budget
    assert lessons.budget(FixedRatio(16), 0.35, None).window == pytest.approx(4.0)
    assert lessons.budget(FixedSlots(4), 0.35, None).window is None


def test_never_more_slots_than_the_compressor_has() -> None:
    eased = Eased(FixedRatio(4), 0.0, most=12)
    assert eased.counts(torch.tensor([40, 8, 0])).tolist() == [12, 8, 0]
    assert eased.window is None
    # What the budget itself asks for is not the lesson's to cut; the compressor says that it is too much.
    assert Eased(FixedRatio(2), 0.5, most=12).counts(torch.tensor([40])).tolist() == [20]


@torch.no_grad()
def test_the_first_lesson_is_the_text_itself(tiny_folder: Any) -> None:
    """With the embeddings as slots, training begins with the loss of the plain model on the shortened texts."""
    lessons = Lessons(first=5, last=40, around=0)
    made = method(
        tiny_folder,
        compressor=lambda width, rms: MeanPool(width, rms, project=False, norm=False),
        source=Source("embeddings"),
        budget=FixedRatio(4),
        lessons=lessons,
        losses=[TeacherForcing()],
        noise=0.0,
    )
    data = batch(squad(tiny_folder), [0, 1, 2], "train")
    torch.manual_seed(3)
    short = lessons.shortened(data, 0.0)
    assert made.train().read(short).counts.tolist() == short["context_mask"].sum(1).tolist() == [5, 5, 5]
    torch.manual_seed(3)
    found = made.step(data)
    plain = method(tiny_folder, mode="full_text", noise=0.0).eval()
    assert float(found.loss_sum) == pytest.approx(float(plain.step(short).loss_sum), rel=1e-4)
    made.progress = 1.0
    assert made.read(data).counts.tolist() == [-(-int(n) // 4) for n in data["context_mask"].sum(1)]
    made.progress = 0.0
    assert made.eval().read(data).counts.tolist() == [-(-int(n) // 4) for n in data["context_mask"].sum(1)]


def test_own_answers_come_from_as_many_slots_as_the_lesson_has(
    tiny_folder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = method(tiny_folder, budget=FixedRatio(4), lessons=Lessons(first=5, last=40, around=0), losses=[OnPolicyKd()])
    counts: list[list[int]] = []
    read = made.reader.read

    def spy(*args: Any) -> Any:
        found = read(*args)
        counts.append(found.counts.tolist())
        return found

    monkeypatch.setattr(made.reader, "read", spy)
    made.train().step(batch(squad(tiny_folder), [0, 1], "train"))
    assert counts == [[5, 5], [5, 5]]


@pytest.mark.parametrize(
    ("data", "budget", "message"),
    [
        ({"scope": "prompt"}, FixedSlots(2), "model.lessons: would cut the question off"),
        ({}, FixedSlots(2, policy="refuse"), "model.lessons: shorten texts, which the policy 'refuse'"),
    ],
)
def test_lessons_that_cannot_be(data: Any, budget: Any, message: str, tiny_folder: Any) -> None:
    made = method(tiny_folder, budget=budget, lessons=Lessons(first=5, last=40))
    made._trainer = SimpleNamespace(datamodule=squad(tiny_folder, **data), world_size=1)  # type: ignore[assignment]
    with pytest.raises(UserError, match=message):
        made.setup("fit")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"first": 0}, "lessons.first must lie between 1 and lessons.last = 224, got 0"),
        ({"first": 300}, "lessons.first must lie between 1 and lessons.last = 224, got 300"),
        ({"around": -1}, "lessons.around must not be negative"),
        ({"grown": 1.5}, "lessons.grown must lie between 0 and 1"),
        ({"hold": 0.6}, "lessons.eased must be larger than lessons.hold = 0.6"),
    ],
)
def test_wrong_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Lessons(**settings)
