"""Problems from files: keys, final answers, prompts, grading, errors."""

import json
from pathlib import Path

import pytest

from kvc.data.problems import MathProblems
from kvc.data.prompts import render_prompt
from kvc.errors import UserError

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"
ROWS = [
    {"question": "2 + 3?", "answer": "2 + 3 = 5\n#### 5"},
    {"problem": "Half of one?", "solution": "It is $\\boxed{\\frac{1}{2}}$.", "answer": "\\frac{1}{2}"},
    {"problem": "AIME?", "answer": "033"},
    {"problem": "Interval?", "solution": "So \\boxed{[0, 3)}."},
]


def write(path: Path, rows: list[dict[str, str]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_final_answers_and_prompts(tmp_path: Path) -> None:
    data = MathProblems(write(tmp_path / "some.jsonl", ROWS))
    rows = data.dataset("test")
    problems = [rows[0, number] for number in range(len(rows))]
    assert [problem.gold for problem in problems] == ["5", "\\frac{1}{2}", "033", "[0, 3)"]
    assert problems[0].prompt == render_prompt("2 + 3?")
    assert [problem.group for problem in problems] == ["some"] * 4
    assert problems[0].judge("thus #### 5.0") == ("5", True)
    assert problems[1].judge("so \\boxed{0.5}").correct
    assert problems[2].judge("the answer is \\boxed{33}").correct
    assert not problems[2].judge("the answer is \\boxed{330}").correct
    assert problems[3].judge("\\boxed{[0,3)}").correct
    assert problems[0].judge("I do not know") == (None, False)
    assert len(MathProblems(data.path, limit=2).dataset("test")) == 2
    assert data.has_split("test")
    assert not data.has_split("train")
    assert data.data_hash() != MathProblems(data.path, limit=2).data_hash()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"answer": "#### 5"}, r"line 2: has none of the keys question, problem"),
        ({"question": "2 + 3?"}, r"line 2: has none of the keys answer, solution"),
        ({"question": "2 + 3?", "solution": "It is\nfive."}, r"line 2: no final answer after ####"),
    ],
)
def test_bad_records(tmp_path: Path, row: dict[str, str], message: str) -> None:
    path = write(tmp_path / "some.jsonl", [ROWS[0], row])
    with pytest.raises(UserError, match=message):
        MathProblems(path).dataset("test")


@pytest.mark.parametrize(
    ("name", "count"), [("gsm8k/test.jsonl", 600), ("math/math500-sample.jsonl", 250), ("math/aime24.jsonl", 30)]
)
def test_real_files(name: str, count: int) -> None:
    path = SHARED / name
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    rows = MathProblems(str(path)).dataset("test")
    assert len(rows) == count
    for number in range(count):
        problem = rows[0, number]
        assert problem.judge(
            f"#### {problem.gold}" if "boxed" in problem.gold else f"\\boxed{{{problem.gold}}}"
        ).correct
