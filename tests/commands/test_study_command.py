"""`study` and `ask` from the command line, and what they say to bad input."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kvc.__main__ import main
from kvc.data.synthetic import study_files

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["--mode", "none", "--budget", "90", "--window", "8", "--prefix", "12", "--device", "cpu"]
GREEDY = ["--temperature", "0", "--max_new_tokens", "6", "--device", "cpu"]


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("facts")
    for name, seed in (("mine", 3), ("other", 4)):
        assert study_files.main([str(folder / name), "--documents", "4", "--facts", "4", "--seed", str(seed)]) == 0
        command = ["study", str(folder / name / "documents.jsonl"), "--output", str(folder / f"memory-{name}"), *SMALL]
        assert main(command) == 0
    return folder


def test_study_then_ask_with_all_baselines(facts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    memory, answers = str(facts / "memory-mine"), tmp_path / "answers.json"
    command = ["ask", memory, "--questions", str(facts / "mine" / "questions.jsonl"), "--output_file", str(answers)]
    command += ["--arms", "none", "memory", "notes", "full", "--unrelated", str(facts / "memory-other")]
    assert main([*command, *GREEDY, "--batch_size", "5"]) == 0
    content = json.loads(answers.read_text())
    assert content["kind"] == "ask"
    assert content["arms"] == ["memory", "none", "full", "notes", "unrelated"]
    assert content["memory"]["study"]["budget"] == 90
    assert content["memory"]["documents"] == 4
    assert len(content["results"]) == 5 * 16
    assert [r["arm"] for r in content["results"][:5]] == content["arms"]
    right = {arm: sum(_right(r) for r in content["results"] if r["arm"] == arm) for arm in content["arms"]}
    assert right["full"] == 16
    assert right["memory"] > right["notes"]
    assert right["none"] < 4
    assert right["unrelated"] < 4
    capsys.readouterr()
    assert main([*command, *GREEDY, "--batch_size", "5"]) == 0
    assert "is finished: 80 results" in capsys.readouterr().out
    # Another process reads the same memory, one question at a time.
    alone = tmp_path / "alone.json"
    more = ["--output_file", str(alone), *GREEDY, "--limit", "6"]
    run = subprocess.run(
        [sys.executable, "-m", "kvc", "ask", memory, "--questions", str(facts / "mine" / "questions.jsonl"), *more],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    mine = [r for r in content["results"] if r["arm"] == "memory"][:6]
    for here, there in zip(mine, json.loads(alone.read_text())["results"], strict=True):
        assert here["all_generations"][0]["generated_text"] == there["all_generations"][0]["generated_text"]


def _right(result: dict[str, Any]) -> bool:
    return bool(result["all_generations"][0]["response"] == result["answer"])


def test_one_answer_is_printed_as_it_comes(facts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = json.loads((facts / "mine" / "questions.jsonl").read_text().splitlines()[-1])
    assert main(["ask", str(facts / "memory-mine"), row["question"], "--arms", "full", *GREEDY]) == 0
    assert capsys.readouterr().out.strip() == row["answer"]
    several = ["--repeat_time", "2", "--max_new_tokens", "4", "--device", "cpu"]
    assert main(["ask", str(facts / "memory-mine"), row["question"], *several]) == 0
    assert [line[:3] for line in capsys.readouterr().out.splitlines() if line.startswith("[")] == ["[1]", "[2]"]


def test_the_folder_name_is_derived_and_found_again(
    facts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["study", str(facts / "mine" / "documents.jsonl"), *SMALL, "--rotation", "place:200", "--data_limit", "2"]
    assert main(command) == 0
    (folder,) = (tmp_path / "memories").iterdir()
    assert folder.name.startswith("tiny-lm_90_8_complex_none_place200_2_")
    metadata = json.loads((folder / "metadata.json").read_text())
    assert metadata["next_position"] == [200]
    assert {"model", "versions", "documents", "summaries", "note", "token_ids", "identity"} <= set(metadata)
    capsys.readouterr()
    assert main(command) == 0
    assert "is there already" in capsys.readouterr().out
    assert main([*command, "--seed", "1"]) == 0
    assert len(list((tmp_path / "memories").iterdir())) == 2


def test_the_configuration_gives_the_same_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    config = ["--config", str(ROOT / "configs" / "study" / "tiny.yaml"), "--run_dir", str(tmp_path / "run")]
    assert main(["predict", *config, "--model.output", str(tmp_path / "yaml")]) == 0
    options = ["--mode", "none", "--budget", "96", "--window", "16", "--prefix", "16", "--device", "cpu"]
    documents = str(ROOT / "data" / "samples" / "facts" / "documents.jsonl")
    assert main(["study", documents, "--output", str(tmp_path / "command"), *options]) == 0
    for name in ("memory.safetensors", "metadata.json"):
        assert (tmp_path / "yaml" / name).read_bytes() == (tmp_path / "command" / name).read_bytes()
    records = [json.loads(line) for line in (tmp_path / "run" / "predictions.jsonl").read_text().splitlines()]
    assert [record["where"] for record in records] == [f"documents.jsonl line {n}" for n in range(1, 7)]


def test_problems_of_both_key_sets(tmp_path: Path) -> None:
    first = {"question": "What is 2 + 3?", "solution": "2 + 3 = 5.", "answer": 5}
    second = {"problem": "What is 1 + 1?", "reasoning": "1 + 1 = 2.", "solution": "It is \\boxed{2}."}
    path = tmp_path / "docs.json"
    path.write_text(json.dumps([first, second]))
    command = ["study", str(path), "--output", str(tmp_path / "m"), *SMALL[2:], "--max_new_tokens", "3"]
    assert main([*command, "--budget", "none", "--summary_complexity", "simple"]) == 0
    said = json.loads((tmp_path / "m" / "metadata.json").read_text())
    assert len(said["summaries"]) == 2
    assert said["kind"] == "problem"
    answer = ["ask", str(tmp_path / "m"), "What is 3 + 3?", "--answer", "6", "--output_file", str(tmp_path / "a.json")]
    assert main([*answer, "--max_new_tokens", "4", "--temperature", "0", "--device", "cpu"]) == 0
    (only,) = json.loads((tmp_path / "a.json").read_text())["results"]
    assert only["answer"] == "6"


GOOD = '{"question": "a", "solution": "b", "answer": "c"}\n'
BAD_DOCUMENTS = [
    ("", "holds no records"),
    (GOOD + '{"question": "a", "answer": "c"}', "line 2: key 'solution' is missing"),
    (GOOD + '{"question": "a", "solution": " ", "answer": "c"}', "line 2: key 'solution' is empty"),
    (GOOD + '{"problem": "a", "solution": "c"}', "line 2: key 'reasoning' is missing"),
    (GOOD + '{"text": "c"}', "line 2: solved problems and plain texts cannot"),
    ('{"a": 1}', "line 1: none of the keys 'question', 'problem', 'text'"),
    ("{", "line 1: not valid JSON"),
]


@pytest.mark.parametrize(("text", "message"), BAD_DOCUMENTS)
def test_bad_documents(text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "docs.jsonl"
    path.write_text(text)
    assert main(["study", str(path), "--output", str(tmp_path / "m"), *SMALL]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--budget", "20"], "budget: must be above window + prefix = 8 + 12 = 20, got 20"),
        (["--rotation", "place"], "rotation: 'place' is not one of"),
        (["--rotation", "place:64"], "rotation: place:64 has no room for 90 rows"),
        (["--policy", "best"], "policy: there is none named 'best'"),
        (["--max_document_tokens", "5"], "documents: all of them have more than max_document_tokens = 5"),
        (["--model", "./nowhere"], "there is no folder ./nowhere"),
        (["--device", "cuda:99"], "--device cuda:99"),
    ],
)
def test_bad_settings_of_a_study(
    facts: Path, options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    documents = str(facts / "mine" / "documents.jsonl")
    assert main(["study", documents, "--output", str(tmp_path / "m"), *SMALL, *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "m").exists()


def test_bad_asking(facts: Path, tmp_path: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    memory = facts / "memory-mine"
    damaged = tmp_path / "damaged"
    shutil.copytree(memory, damaged)
    content = bytearray((damaged / "memory.safetensors").read_bytes())
    content[-100] ^= 1
    (damaged / "memory.safetensors").write_bytes(content)
    questions = str(facts / "mine" / "questions.jsonl")
    bad: list[tuple[list[str], str]] = [
        ([str(memory)], "one question, or --questions FILE"),
        ([str(memory), "q", "--questions", questions], "one question, or --questions FILE"),
        ([str(tmp_path), "q"], "holds no studied memory"),
        ([str(memory), "q", "--arms", "all"], "--arms: there is none named 'all'"),
        ([str(memory), "q", "--arms", "unrelated"], "needs --unrelated MEMORY"),
        ([str(memory), "q", "--doc_id", "2"], "doc_id: "),
        ([str(memory), "q", "--model", str(tiny_folder)], "a memory of the model 'tiny-lm'"),
        ([str(memory), "q", "--repeat_time", "2", "--temperature", "0"], "repeat_time: greedy"),
        ([str(damaged), "q"], "damaged"),
    ]
    for options, message in bad:
        assert main(["ask", *options, "--output_file", str(tmp_path / "a.json")]) == 2, options
        error = capsys.readouterr().err
        assert message in error
        assert len(error.splitlines()) == 1
        assert not list(tmp_path.glob("*a.json*"))
