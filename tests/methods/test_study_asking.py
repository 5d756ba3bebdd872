"""Answers: from the memory and not from elsewhere, the same however they are batched, kept when a run is killed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from study_tiny import ASKED, planned, study, tiny

from kvc.cache.memory import KVMemory
from kvc.errors import UserError
from kvc.methods.study.answers import AnswerFile
from kvc.methods.study.arms import ARMS, Arm, arms_of
from kvc.methods.study.asking import AskSettings, ask, response
from kvc.methods.study.questions import read_questions

GREEDY = AskSettings(temperature=0, max_new_tokens=6)
Studied = tuple[KVMemory, dict[str, Any]]


@pytest.fixture(scope="module")
def studied(tmp_path_factory: pytest.TempPathFactory) -> Studied:
    return study(tmp_path_factory.mktemp("studied"), budget=64)


def texts(results: list[dict[str, Any]]) -> list[list[str]]:
    return [[generation["generated_text"] for generation in result["all_generations"]] for result in results]


def test_the_memory_answers_and_the_baselines_say_what_it_is_worth(studied: Studied, tmp_path: Path) -> None:
    model, _ = tiny()
    memory, said = studied
    conversation = planned().conversation
    before = memory.layers[0].keys.clone()
    stranger = KVMemory(model)
    with torch.no_grad():
        model(input_ids=torch.tensor([planned().opening]), past_key_values=stranger)
    arms = arms_of(ARMS, model, conversation, memory, said, stranger)
    assert [arm.name for arm in arms] == list(ARMS)
    right = {}
    for arm in arms:
        results = ask(model, conversation, arm, ASKED, GREEDY)
        right[arm.name] = sum(r["all_generations"][0]["response"] == r["answer"] for r in results)
        known = 0 if arm.memory is None else int(arm.memory.next_position[0])
        for result in results:
            generation = result["all_generations"][0]
            assert generation["cache_seq_len"] == known
            held = 0 if arm.memory is None else float(arm.memory.tokens[0])
            new = generation["input_length"] + generation["output_length"] - 1
            assert generation["kv_tokens_peak"] == held + new
    assert right["full"] == len(ASKED)
    assert right["none"] == right["unrelated"] == 0
    assert right["memory"] > 12 > right["notes"]
    assert torch.equal(memory.layers[0].keys, before)


def test_samples_of_one_batch_are_single_runs_with_the_same_seeds(studied: Studied) -> None:
    model, _ = tiny()
    arm = Arm("memory", studied[0])
    conversation = planned().conversation
    hot: dict[str, Any] = {"temperature": 3.0, "top_p": 1.0, "max_new_tokens": 12}
    together = texts(ask(model, conversation, arm, ASKED[:3], AskSettings(repeat_time=4, seed=5, **hot)))
    assert len({text for row in together for text in row}) > 3
    for number, question in enumerate(ASKED[:3]):
        for sample in range(4):
            single = ask(model, conversation, arm, [question], AskSettings(seed=5 + sample, **hot))
            assert texts(single) == [[together[number][sample]]]


def test_notes_are_what_was_written_or_as_much_text_as_there_are_rows(studied: Studied) -> None:
    model, tokenizer = tiny()
    memory, said = studied
    conversation = planned().conversation
    (cut,) = arms_of(["notes"], model, conversation, memory, said)
    assert cut.memory is not None
    assert cut.memory.next_position.tolist() == [64]
    (noted,) = arms_of(["notes"], model, conversation, memory, {**said, "note": "1. Tina lives in Oslo."})
    ids = planned().opening + tokenizer("1. Tina lives in Oslo.\n\n", add_special_tokens=False)["input_ids"]
    assert noted.memory is not None
    assert noted.memory.next_position.tolist() == [len(ids)]


def test_the_answer_is_what_follows_the_thinking() -> None:
    assert response("so 3 </think>\n\nThe answer is 4.") == "The answer is 4."
    assert response("<think>a</think>b</think> c ") == "c"
    assert response("cut off ") == "cut off"
    assert response("all thought</think>") == ""


def test_bad_settings_are_refused() -> None:
    with pytest.raises(UserError, match="repeat_time: greedy"):
        AskSettings(repeat_time=2, temperature=0)
    with pytest.raises(UserError, match="max_new_tokens"):
        AskSettings(max_new_tokens=0)


def result(arm: str, name: int | str) -> dict[str, Any]:
    return {"arm": arm, "id": name}


def test_answers_survive_a_kill_and_end_in_one_file(tmp_path: Path) -> None:
    path, head = tmp_path / "a.json", {"arms": ["memory", "none"]}
    killed = AnswerFile(path, head)
    killed.add([result("none", 1), result("memory", "1")])
    with killed.journal.open("a") as file:
        file.write('{"arm": "memo')
    again = AnswerFile(path, head)
    assert again.has("none", 1)
    assert not again.has("none", "1")
    again.add([result("memory", 1), result("none", "1")])
    content = again.finish([1, "1"])
    assert [(r["arm"], r["id"]) for r in content["results"]] == [
        ("memory", 1),
        ("none", 1),
        ("memory", "1"),
        ("none", "1"),
    ]
    assert json.loads(path.read_text()) == content
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]
    assert AnswerFile(path, head).finished
    with pytest.raises(UserError, match="exists and holds something else"):
        AnswerFile(path, {"arms": ["memory"]})
    assert not AnswerFile(path, {"arms": ["memory"]}, overwrite=True).finished


def test_answers_of_other_settings_are_not_gone_on_with(tmp_path: Path) -> None:
    AnswerFile(tmp_path / "a.json", {"arms": ["none"]}).add([result("none", 1)])
    assert AnswerFile(tmp_path / "a.json", {"arms": ["none"], "seed": 1}).results == []


def test_questions_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text(
        '{"question": "a", "answer": "so\\n#### 1,200"}\n{"problem": "b", "solution": "x \\\\boxed{\\\\frac{1}{2}}"}\n'
    )
    first, second = read_questions(path)
    assert (first.id, first.question, first.answer) == (0, "a", "1,200")
    assert second.answer == r"\frac{1}{2}"
    path.write_text('{"question": "a", "id": "x"}\n{"question": "b", "id": "x"}\n')
    with pytest.raises(UserError, match="'x' is there twice"):
        read_questions(path)
    path.write_text('{"question": "a"}\n{"answer": "b"}\n')
    with pytest.raises(UserError, match="line 2: has none of the keys question, problem"):
        read_questions(path)
