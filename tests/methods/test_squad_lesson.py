"""What a training step asks of the student and the teacher for each term of the loss."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from squad_tiny import batch, method, squad

from kvc.core.backbone import Lora
from kvc.methods.squad.lesson import look
from kvc.methods.squad.losses import (
    FirstErrorCe,
    Kd,
    Mix,
    OnPolicyKd,
    Predicted,
    SelfCritical,
    TeacherForcing,
    Term,
)
from kvc.methods.squad.reading import Tokens

GOLD = torch.tensor([[5, 6, 2], [7, 2, -100]])
GREEDY = torch.tensor([[5, 9, 2], [8, -100, -100]])
SAMPLED = torch.tensor([[4, 2], [3, 2]])


class Student:
    """Notes what it is asked."""

    def __init__(self) -> None:
        self.reading: Any = SimpleNamespace(slots=None)
        self.reads = 0
        self.predicted: list[torch.Tensor] = []
        self.asked_teacher: list[torch.Tensor] = []
        self.said: list[bool] = []

    def read(self, batch: Any) -> Any:
        self.reads += 1
        return self.reading

    def predict(self, reading: Any, batch: Any, answer: Tokens) -> Predicted:
        assert reading is self.reading
        self.predicted.append(answer.labels)
        kept = answer.labels != -100
        return Predicted(torch.zeros(int(kept.sum()), 16), answer.labels[kept], kept.nonzero()[:, 0], len(kept))

    def say(self, batch: Any, sample: bool = False) -> torch.Tensor:
        self.said.append(sample)
        return SAMPLED if sample else GREEDY

    def taught(self, batch: Any, answer: Tokens) -> torch.Tensor:
        self.asked_teacher.append(answer.labels)
        return torch.ones(int(answer.mask.sum()), 16)

    def rewards(self, batch: Any, ids: torch.Tensor) -> torch.Tensor:
        return ids[:, 0].float()


def lesson(*terms: Term) -> tuple[Student, Any]:
    student = Student()
    gold = Tokens.labelled(GOLD)
    evidence, predicted = look(student, Mix(terms, 4), {"answer_ids": gold.ids, "answer_mask": gold.mask})
    assert evidence.gold is predicted
    assert torch.equal(student.predicted[0], GOLD)
    assert student.reads == 1
    return student, evidence


def test_nobody_answers_where_no_term_asks_for_it() -> None:
    student, evidence = lesson(TeacherForcing())
    assert (student.said, student.asked_teacher, len(student.predicted)) == ([], [], 1)
    assert evidence.gold.teacher is None
    student, evidence = lesson(Kd(), TeacherForcing())
    assert (student.said, len(student.predicted)) == ([], 1)
    assert [labels.tolist() for labels in student.asked_teacher] == [GOLD.tolist()]
    assert len(evidence.gold.teacher) == len(evidence.gold.targets)


@pytest.mark.parametrize(("share", "answers"), [(0.0, GREEDY), (1.0, GOLD)])
def test_teacher_and_student_go_along_the_same_answers(share: float, answers: torch.Tensor) -> None:
    student, evidence = lesson(OnPolicyKd(gold_share=share))
    assert student.said == [False]
    assert student.predicted[1].tolist() == answers.tolist()
    assert [labels.tolist() for labels in student.asked_teacher] == [answers.tolist()]
    assert evidence.own.targets.tolist() == answers[answers != -100].tolist()


def test_the_reward_is_that_of_the_sample_above_the_greedy_answer() -> None:
    student, evidence = lesson(SelfCritical())
    assert sorted(student.said) == [False, True]
    assert evidence.advantage.tolist() == [4 - 5, 3 - 8]
    assert evidence.own.targets.tolist() == [4, 2, 3, 2]
    assert student.asked_teacher == []


def test_gold_counts_until_the_greedy_answer_errs() -> None:
    _, evidence = lesson(FirstErrorCe())
    assert evidence.agreed.tolist() == [True, True, False, True, False]


def test_the_student_answers_without_dropout(tiny_folder: Any) -> None:
    made, data = method(tiny_folder, lora=Lora(r=4, dropout=0.9)), batch(squad(tiny_folder), [0, 1, 2, 3])
    made.eval()
    expected = made.say(data)
    made.train()
    for _ in range(2):
        assert torch.equal(made.say(data), expected)
        assert made.training
        assert made.backbone.training
