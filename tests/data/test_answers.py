import pytest

from kvc.data.answers import extract_answer, final_answer, normalize_number, same_answer


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("$1,234.00", "1234"),
        ("**72**", "72"),
        ("9 cm\u00b2", "9"),
        ("9%.", "9"),
        ("50\\%", "50"),
        ("-5", "-5"),
        ("-$5", "-5"),
        ("\u22123", "-3"),
        (".5", "0.5"),
        ("0.50", "0.5"),
        ("007", "7"),
        (r"\frac{1}{2}", "0.5"),
        (r"2\frac{1}{2}", "2.5"),
        ("3 1/2", "3.5"),
        ("1/3", "1/3"),
        ("\\$18.90", "18.9"),
        (r"90^\circ", "90"),
        ("12 hours a day", "12"),
        ("9 + x", None),
        ("3, 4", None),
        ("(3,4)", None),
        ("5x", None),
        ("10^{2}", None),
        ("3:30", None),
        ("1e3", None),
        ("1/0", None),
        ("", None),
        ("Evelyn", None),
        ("-0.05", "-0.05"),
    ],
)
def test_normalize_number(text, number):
    assert normalize_number(text) == number


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("a = 5\n#### 72", "72"),
        ("####: $1,080.", "1080"),
        ("####\n72\n", "72"),
        ("#### **72**", "72"),
        ("48 slices ####", "48"),
        ("#### 1\nno wait\n#### 2", "2"),
        ("#### Step 3: add\nthe answer is 12.", "12"),
        (r"so \boxed{1} and \boxed{\frac{3}{4}} ok", "0.75"),
        (r"\boxed{x^{2}+1}", "x^{2}+1"),
        (r"\boxed{7} then \boxed{8", "7"),
        ("The answer is 3,000 dollars.", "3000"),
        ("a 12-5", "5"),
        ("nothing", None),
        ("#### Evelyn", "Evelyn"),
    ],
)
def test_extract_answer(completion, answer):
    assert extract_answer(completion) == answer


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        ("$1,234.00", "1234", True),
        ("0.5", r"\frac{1}{2}", True),
        ("$192 million", "192000000", True),
        ("192 million", "192", True),
        ("72", "73", False),
        ("72", None, False),
        (None, None, False),
        ("Evelyn", r"\text{Evelyn}", True),
        ("5x", "5", False),
    ],
)
def test_same_answer(a, b, same):
    assert same_answer(a, b) is same


def test_a_list_before_the_sign_is_no_answer():
    assert final_answer("Pens: 4, Pencils: 18 ####") is None
    assert final_answer("no sign") is None
