"""Official SQuAD files: what is read, and what is said about files that are not right."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from kvc.data.squad import official
from kvc.data.squad.official import load_squad
from kvc.errors import UserError

CONTEXT = "Paris is the capital of France. The \u20ac is its currency."
DOCUMENT: dict[str, Any] = {
    "version": "v2.0",
    "data": [
        {
            "title": "France",
            "paragraphs": [
                {
                    "context": CONTEXT,
                    "qas": [
                        {
                            "id": "a",
                            "question": "What is the capital?",
                            "answers": [
                                {"text": "Paris", "answer_start": 0},
                                {"text": "Paris is", "answer_start": 0},
                            ],
                        },
                        {
                            "id": "b",
                            "question": "Which currency?",
                            "answers": [{"text": "\u20ac", "answer_start": 36}],
                            "is_impossible": False,
                        },
                        {
                            "id": "c",
                            "question": "Who rules?",
                            "answers": [],
                            "plausible_answers": [{"text": "Paris", "answer_start": 0}],
                            "is_impossible": True,
                        },
                    ],
                }
            ],
        }
    ],
}


def write(tmp_path: Path, document: Any) -> str:
    path = tmp_path / "squad.json"
    path.write_text(document if isinstance(document, str) else json.dumps(document), encoding="utf-8")
    return str(path)


def test_both_versions_are_read(tmp_path: Path) -> None:
    first, second, third = load_squad(write(tmp_path, DOCUMENT))
    assert (first.key, first.answers, first.starts) == ("a", ("Paris", "Paris is"), (0, 0))
    assert second.answers == ("\u20ac",)
    assert second.context[second.starts[0]] == "\u20ac"
    assert (third.answers, third.starts, third.answerable) == (("",), (-1,), False)
    assert first.group == second.group == third.group
    older = copy.deepcopy(DOCUMENT)
    qas = older["data"][0]["paragraphs"][0]["qas"]
    del qas[2], qas[1]["is_impossible"]
    assert [example.key for example in load_squad(write(tmp_path, older))] == ["a", "b"]


QA = "data[0].paragraphs[0].qas[0]"


def changed(path: list[Any], value: Any) -> Any:
    document = copy.deepcopy(DOCUMENT)
    place: Any = document
    for key in path[:-1]:
        place = place[key]
    if value is None:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return document


HERE = ["data", 0, "paragraphs", 0, "qas", 0]


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ('{"data": [\n{"title" 5}]}', " line 2: not valid JSON: Expecting ':' delimiter (column 10)"),
        ("[" * 100000, ": not valid JSON: nested too deeply"),
        ([{"question": "q"}], ": not the official form of SQuAD: expected an object with the key 'data'"),
        ({"data": {}}, ": data: expected a list, got dict"),
        ({"data": []}, ": holds no questions"),
        (changed(["data", 0, "paragraphs"], None), ": data[0]: key 'paragraphs' is missing"),
        (changed(["data", 0], 7), ": data[0]: expected an object, got int"),
        (
            changed(["data", 0, "paragraphs", 0, "context"], 5),
            ": data[0].paragraphs[0].context: expected text, got int",
        ),
        (changed([*HERE, "id"], None), f": {QA}: key 'id' is missing"),
        (changed([*HERE, "id"], "b"), ": two questions have the id 'b'"),
        (changed([*HERE, "question"], ["x"]), f": {QA}.question: expected text, got list"),
        (changed([*HERE, "answers"], []), f": {QA}: has no answer and is not marked is_impossible"),
        (changed([*HERE, "is_impossible"], "no"), f": {QA}.is_impossible: expected true or false, got 'no'"),
        (changed([*HERE, "is_impossible"], True), f": {QA}: is_impossible is true, yet there are answers"),
        (
            changed([*HERE, "answers", 1, "answer_start"], 1),
            f": {QA}.answers[1]: the context does not hold 'Paris is' at answer_start 1",
        ),
        (
            changed([*HERE, "answers", 0, "answer_start"], -len(CONTEXT)),
            f": {QA}.answers[0]: the context does not hold 'Paris' at answer_start {-len(CONTEXT)}",
        ),
        (
            changed([*HERE, "answers", 0, "answer_start"], 10**9),
            f": {QA}.answers[0]: the context does not hold 'Paris' at answer_start 1000000000",
        ),
        (
            changed([*HERE, "answers", 0, "answer_start"], "0"),
            f": {QA}.answers[0].answer_start: expected a whole number, got '0'",
        ),
        (changed([*HERE, "answers", 0, "text"], " "), f": {QA}.answers[0].text: is empty"),
    ],
)
def test_one_sentence_names_file_and_place(document: Any, message: str, tmp_path: Path) -> None:
    path = write(tmp_path, document)
    with pytest.raises(UserError) as caught:
        load_squad(path)
    assert str(caught.value) == path + message


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none.json: no such file"):
        load_squad(str(tmp_path / "none.json"))
    (tmp_path / "bytes.json").write_bytes(b'{"data": "\xff"}')
    with pytest.raises(UserError, match=r"bytes.json: is not UTF-8 text \(byte 10\)"):
        load_squad(str(tmp_path / "bytes.json"))
    with pytest.raises(UserError, match="cannot be read"):
        load_squad(str(tmp_path))


def test_rows_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        {"id": "a", "context": CONTEXT, "question": "q", "answers": {"text": ["Paris"], "answer_start": [0]}},
        {"id": "b", "context": CONTEXT, "question": "q", "answers": {"text": [], "answer_start": []}},
    ]
    asked = []

    def hub_records(name: str, split: str) -> Any:
        asked.append((name, split))
        return [(f"hub:{name} record {number}", row) for number, row in enumerate(rows, start=1)]

    monkeypatch.setattr(official, "hub_records", hub_records)
    first, second = load_squad("hub:rajpurkar/squad_v2", "validation")
    assert asked == [("rajpurkar/squad_v2", "validation")]
    assert (first.answers, second.answers) == (("Paris",), ("",))
    rows[0]["answers"] = {"text": ["Rome"], "answer_start": [0]}
    with pytest.raises(UserError, match=r"hub:x/y record 1: answers\[0\]: the context does not hold 'Rome'"):
        load_squad("hub:x/y")
