"""Answers in responses, and what counts as the same answer."""

import pytest

from kvc.scoring.equality import kind_of, same
from kvc.scoring.extraction import extract


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"so \boxed{\frac{1}{2}}", "0.5"),
        (r"\boxed{1} or rather \boxed{\frac{\sqrt{3}}{2}}.", r"\frac{\sqrt{3}}{2}"),
        (r"\boxed{\text{Area}=\{x : x^{2_{1}} > 0\}}", r"\text{Area}=\{x : x^{2_{1}} > 0\}"),
        (r"\boxed{\left\{1, 2\right.} and no more", r"\left\{1, 2\right."),
        (r"first \boxed{7}, then cut off in \boxed{8", "7"),
        (r"\fbox{3} \boxed {016}", "16"),
        ("\\boxed{16}\nThe answer is 17.", "16"),
        ("It takes 3 steps.\n#### 42", "42"),
        ("The answer is: 42. There were 7 of them.", "42"),
        ("**Final Answer:** $1,234.00 for 3 nights", "1234"),
        ("Answer:\n\n12", "12"),
        ("The answer is 5? No: the answer is 6, for 2 reasons.", "6"),
        ("The answer is therefore clear: 3 + 4 = 7", "7"),
        ("of 3 and 4, 1,500 remain", "1500"),
        ("no idea", None),
        ("", None),
    ],
)
def test_number_is_found(response: str, answer: str | None) -> None:
    assert extract(response, "number") == answer


@pytest.mark.parametrize(
    ("response", "kind", "answer"),
    [
        (" Paris\nQuestion: Where does Tina live?", "words", "Paris"),
        ("I read that in 1990. The answer is **Oslo**.", "words", "Oslo"),
        (r"So \boxed{\text{Rome}}", "words", r"\text{Rome}"),
        ("We expand it.\n\n$x^2+1$", "expression", "$x^2+1$"),
        ("Hence the answer is $x+1$.", "expression", "$x+1$"),
        (" \n", "words", None),
    ],
)
def test_other_answers_are_found(response: str, kind: str, answer: str | None) -> None:
    assert extract(response, kind) == answer  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("016", "16"),
        ("16", "016"),
        ("3/4", r"\frac{3}{4}"),
        ("0.75", r"\frac34"),
        (r"\dfrac{3}{4}", r"\frac{6}{8}"),
        ("1,000", "1000"),
        ("16 players", "16"),
        (r"\frac{1}{\sqrt2}", r"\sqrt{2}/2"),
        ("2^4", "16"),
        ("1+x^2", "$x^2+1$"),
        (r"\(x=5\)", "5"),
        (r"\{2,1\}", r"\{1,2\}"),
        ("paris.", "Paris"),
        (r"\text{Paris}", "Paris"),
        ("(C)", "C"),
    ],
)
def test_same_answers(answer: str, gold: str) -> None:
    assert same(answer, gold)


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("17", "16"),
        ("0.333", r"\frac13"),
        (None, "16"),
        ("", "16"),
        ("5 Room", "Room 5"),
        ("Sirap", "Paris"),
        ("sixteen", "16"),
        ("3:45", "3:30"),
        ("(4,3)", "(3,4)"),
        ("x^2-1", "x^2+1"),
    ],
)
def test_other_answers_differ(answer: str | None, gold: str) -> None:
    assert not same(answer, gold)


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        ("16 cm", "number"),
        (r"\frac12", "number"),
        (r"\sqrt{2}", "expression"),
        (r"\pi", "expression"),
        ("sin(x)/2", "expression"),
        ("(1, 2)", "expression"),
        (r"\text{odd}", "words"),
        ("Room 5", "words"),
        ("Al", "words"),
    ],
)
def test_kinds(answer: str, kind: str) -> None:
    assert kind_of(answer) == kind
