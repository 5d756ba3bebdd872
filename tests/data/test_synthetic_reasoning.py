import hashlib
import random
import re

import pytest

from kvc.data.synthetic.base import document_text, rng_for, split_of
from kvc.data.synthetic.example import plain
from kvc.data.synthetic.layout import COMP
from kvc.data.synthetic.reasoning import problem_example, problem_for, sample_problem
from kvc.data.traces import strip_markers, synthetic_traces

TRACES = synthetic_traces(500, seed=7)
NUMBERS = {"twice": "* 2", "doubles": "* 2", "3 times": "* 3", "triples": "* 3", "half": "/ 2"}


def rule_f1(rule):
    """F1 over all traces of a rule that gives a set of offsets for a text."""
    hits = predicted = true = 0
    for trace in TRACES:
        guess, marks = rule(trace.text), set(trace.marks)
        hits, predicted, true = hits + len(guess & marks), predicted + len(guess), true + len(marks)
    return 2 * hits / (predicted + true)


def ends(pattern):
    return lambda text: {match.end() for match in re.finditer(pattern, text)}


def test_simple_rules_are_poor_but_not_hopeless():
    any_newline = rule_f1(ends(r"[^\n](?=\n)"))
    sentence_newline = rule_f1(ends(r"\.(?=\n)"))
    full_stop = rule_f1(ends(r"\."))
    print(f"F1: newline {any_newline:.3f}, full stop + newline {sentence_newline:.3f}, full stop {full_stop:.3f}")
    assert 0.2 <= any_newline <= 0.7
    assert 0.2 <= sentence_newline <= 0.7
    assert 0.3 <= full_stop <= 0.7


def test_a_mark_ends_a_phase():
    # A bound result or start fact is marked unless the very next equation starts from its owner's number.
    finished = re.compile(r"(?:so (\w+) (?:has|have) (\d+) \w+|(\w+) starts with (\d+) \w+)\.\Z")
    kept = 0
    for trace in TRACES:
        for stop in re.finditer(r"\.", trace.text):
            ended = finished.search(trace.text[: stop.end()])
            marked = stop.end() in trace.marks
            if ended and not marked:
                kept += 1
                following = re.search(r"(\d+) [-+*/] (\d+) =", trace.text[stop.end() :])
                assert following is not None
                assert (ended[2] or ended[4]) in following.groups(), "an unmarked number is needed at once"
            else:
                assert bool(ended) or not marked or "together they have" in trace.text[: stop.end()]
    assert kept > 200


def replay(problem):
    """Solve the problem from its statements alone."""
    values = {}
    for statement in problem.statements:
        names = [word for word in re.findall(r"[A-Z]\w+", statement) if word != "Then"]
        number = re.search(r"\d+", statement)
        operand = int(number.group()) if number else 0
        if "starts with" in statement:
            values[names[0]] = operand
            continue
        value = values[names[-1]]
        if "twice" in statement or "doubles" in statement:
            value *= 2
        elif "3 times" in statement or "triples" in statement:
            value *= 3
        elif "half" in statement:
            value //= 2
        elif re.search(r"fewer|less|gives away|loses|sells", statement):
            value -= operand
        else:
            value += operand
        values[names[0]] = value
        assert 1 <= value <= 99
    return values


def test_answers_and_equations_are_right():
    for index in range(300):
        problem = problem_for("train", 3, index)
        values = replay(problem)
        asked = re.findall(r"[A-Z]\w+", problem.question.rsplit(". ", 1)[1].replace("How", ""))
        assert sum(values[name] for name in asked) == int(problem.answer)
        equations = re.findall(r"(\d+) ([-+*/]) (\d+) = (\d+)", problem.original_reasoning)
        assert len(equations) == problem.steps
        for left, sign, right, result in equations:
            a, b = int(left), int(right)
            assert {"+": a + b, "-": a - b, "*": a * b, "/": a / b}[sign] == int(result)
        assert problem.original_reasoning.endswith(f"\n#### {problem.answer}")


def test_markers_number_1_to_20_and_close_the_last_step():
    for index in range(300):
        marked = problem_for("train", 4, index, (1, 16)).reasoning_with_compression
        assert 1 <= marked.count(COMP) <= 20
        assert re.search(rf"\. {COMP}\n#### \d+\Z", marked)


def test_steps_stay_in_the_asked_range():
    counts = {problem_for("train", 5, index, (2, 5)).steps for index in range(200)}
    assert counts == {2, 3, 4, 5}


def test_the_last_number_is_a_poor_answer():
    right = sum(re.findall(r"= (\d+)", trace.text)[-1] == trace.answer for trace in TRACES)
    assert right / len(TRACES) < 0.75


def test_stripping_markers_gives_the_original():
    for trace in TRACES:
        assert strip_markers(trace.reasoning_with_compression)[0] == trace.original_reasoning


def test_layouts_vary():
    text = "\n".join(trace.text for trace in TRACES)
    assert len(re.findall(r"Keep in mind: ", text)) > 200
    assert len(re.findall(r"Next we look at ", text)) > 200
    assert re.search(r":\n\d+ . \d+ = \d+,\nso ", text)


def test_document_is_prompt_then_solution():
    problem = problem_for("train", 42, 0)
    document = plain(problem_example(problem))
    assert document_text(document) == f"Question: {problem.question}\nSolution:\n{problem.original_reasoning}"
    assert {segment.kind for segment in document if segment.text in problem.question} == {"context", "answer", "result"}
    assert all(re.fullmatch(r" ?\d+", segment.text) for segment in document if segment.kind == "result")
    assert not any(re.search(r"\d", segment.text) for segment in document if segment.kind == "answer")


def test_splits_share_no_question():
    train = {problem_for("train", 42, index).question for index in range(2000)}
    test = {problem_for("test", 42, index).question for index in range(2000)}
    assert len(train) > 1990
    assert len(test) > 1990
    assert not train & test
    assert {split_of(question.split(" How many ")[0]) for question in test} == {"test"}


def test_generation_is_pinned():
    text = "\n\n".join(problem_for("val", 42, index).reasoning_with_compression for index in range(50))
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "7b6a84036ee6546d"


def test_nothing_touches_the_global_generator():
    state = random.getstate()
    sample_problem(rng_for("reasoning", "train", 1, 1))
    assert random.getstate() == state


@pytest.mark.parametrize(
    "other",
    [("x", "train", 1, 1), ("reasoning", "val", 1, 1), ("reasoning", "train", 2, 1), ("reasoning", "train", 1, 2)],
)
def test_every_key_matters(other):
    assert rng_for("reasoning", "train", 1, 1).random() == rng_for("reasoning", "train", 1, 1).random()
    assert rng_for("reasoning", "train", 1, 1).random() != rng_for(*other).random()
