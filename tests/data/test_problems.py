"""Problems from files: keys, final answers, prompts, grading, errors."""

import json
from pathlib import Path

import pytest

from kvc.__main__ import main
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


def test_an_evaluation_answers_them(tmp_path: Path) -> None:
    model = {"class_path": "kvc.methods.rkv.EvictionReport", "init_args": {"budgets": [32], "max_new_tokens": 5}}
    init = {"path": write(tmp_path / "some.jsonl", ROWS), "eval_batch_size": 3}
    data = {"class_path": "kvc.data.problems.MathProblems", "init_args": init}
    trainer = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False}
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps({"trainer": trainer, "model": model, "data": data}))
    assert main(["test", "--config", str(config), "--run_dir", str(tmp_path / "run")]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "predictions.jsonl").read_text().splitlines()]
    assert [line["gold"] for line in lines] == ["5", "\\frac{1}{2}", "033", "[0, 3)"]
    assert set(lines[0]["arms"]) == {"full", "rkv@32"}


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
