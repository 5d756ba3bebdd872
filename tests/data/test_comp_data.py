"""From traces to labelled tokens: characters of several bytes, splits by question."""

import json

import pytest
from transformers import AutoTokenizer

from kvc.core.backbone import tiny_folder
from kvc.data.comp import CompTraces, label_trace
from kvc.data.traces import Trace


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(tiny_folder())


@pytest.mark.parametrize("sign", ["€", "\u00d7", "😀", "é", "5"])
def test_a_label_never_stands_inside_a_character(tokenizer, sign):
    item = label_trace(Trace("q", f"It costs 5 {sign} <COMP>\nNext.", ""), 0, tokenizer, "plain")
    assert sum(item.labels) == 1
    position = item.labels.index(1)
    text = f"It costs 5 {sign}"
    assert tokenizer.decode(item.ids[: position + 1]) == text
    assert item.newline[position] == 1


def test_splits_share_no_question(tmp_path):
    rows = [
        {"question": f"q{i // 3}", "reasoning_with_compression": f"1 + {i} = {1 + i} <COMP>\n#### {1 + i}"}
        | {"answer": str(1 + i)}
        for i in range(60)
    ]
    path = tmp_path / "traces.json"
    path.write_text(json.dumps(rows))
    parts = {name: {t.question for t in part} for name, part in CompTraces(str(path)).traces.items()}
    assert [len(part) for part in parts.values()] == [16, 2, 2]
    assert len(set().union(*parts.values())) == 20


def test_a_share_of_zero_gets_nothing(tmp_path):
    rows = [
        {"question": f"q{i}", "reasoning_with_compression": "1 + 1 = 2 <COMP>\n#### 2", "answer": "2"} for i in range(5)
    ]
    path = tmp_path / "traces.json"
    path.write_text(json.dumps(rows))
    sizes = [len(part) for part in CompTraces(str(path), split=(0.5, 0.5, 0.0)).traces.values()]
    assert sizes == [2, 3, 0]


def test_one_number_splits(tmp_path):
    rows = [
        {"question": f"q{i}", "reasoning_with_compression": "1 + 1 = 2 <COMP>\n#### 2", "answer": "2"}
        for i in range(20)
    ]
    path = tmp_path / "traces.json"
    path.write_text(json.dumps(rows))
    sizes = [len(part) for part in CompTraces(str(path), train_ratio=0.9).traces.values()]
    assert sizes == [18, 1, 1]


def test_the_contents_name_the_data(tmp_path):
    row = {"question": "q", "reasoning_with_compression": "1 + 1 = 2 <COMP>\n#### 2", "answer": "2"}
    path = tmp_path / "traces.json"
    path.write_text(json.dumps([row] * 3))
    before = CompTraces(str(path)).data_hash()
    path.write_text(json.dumps([{**row, "question": "another"}] * 3))
    assert CompTraces(str(path)).data_hash() != before
