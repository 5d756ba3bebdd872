import json
import random
import re
from pathlib import Path

import pytest

from kvc.data.traces import (
    Trace,
    filter_valid,
    load_traces,
    read_traces,
    strip_markers,
    synthetic_traces,
    validate,
    write_jsonl,
)
from kvc.errors import UserError

REAL = Path(__file__).parents[3] / "shared/data/gsm8k/gsm8k_compressed_train.json"
SAMPLES = Path(__file__).parents[2] / "data/samples"
real_data = pytest.mark.skipif(not REAL.exists(), reason=f"{REAL} is not on this machine")
RECORD = {"question": "q", "reasoning_with_compression": "1 + 1 = 2 <COMP>\n#### 2", "answer": "2"}


@pytest.mark.parametrize(
    ("marked", "text", "marks"),
    [
        ("a = 5 <COMP>\nb", "a = 5\nb", (5,)),
        ("a. <COMP> B", "a. B", (2,)),
        ("a. <COMP>B", "a. B", (2,)),
        ("one<COMP>two", "one two", (3,)),
        ("a <COMP>.", "a.", (1,)),
        ("(<COMP>5)", "(5)", (1,)),
        ("<COMP> a", "a", ()),
        ("\n <COMP>\na <COMP>\n", "a\n", (1,)),
        ("a <COMP> <COMP><COMP> b", "a b", (1,)),
        ("a\n<COMP>\nb", "a\nb", (1,)),
        ("a\n<COMP>\n\nb", "a\n\nb", (1,)),
        ("a\n\n<COMP>\n\nb", "a\n\nb", (1,)),
        ("a\n<COMP> b", "a\nb", (1,)),
        ("a   \nb\t\nc", "a\nb\nc", ()),
        ("a <COMP>  \r\nb", "a\nb", (1,)),
        ("a <COMP>", "a", (1,)),
        ("", "", ()),
        ("<COMP>", "", ()),
    ],
)
def test_strip_markers(marked, text, marks):
    assert strip_markers(marked) == (text, marks)


def test_stripping_leaves_no_cue_and_marks_visible_characters():
    rng = random.Random(0)
    for _ in range(2000):
        marked = "".join(rng.choice(["a", "b", "7", " ", "\n", ".", "<COMP>", " <COMP>"]) for _ in range(20))
        text, marks = strip_markers(marked)
        assert "<COMP>" not in text
        assert " \n" not in text
        assert not text.endswith(" ")
        assert list(marks) == sorted(set(marks))
        assert all(not text[mark - 1].isspace() for mark in marks)
        assert strip_markers(text) == (text, ())
        visible = marked.replace("<COMP>", "").split()
        assert "".join(text.split()) == "".join(visible)


def test_json_list_and_jsonl_are_told_apart_by_content(tmp_path):
    as_list, as_lines = tmp_path / "a.txt", tmp_path / "b.json"
    as_list.write_text(" \n" + json.dumps([RECORD, RECORD], indent=2))
    as_lines.write_text(json.dumps(RECORD) + "\n\n" + json.dumps(RECORD) + "\n", encoding="utf-8-sig")
    assert read_traces(as_list) == read_traces(as_lines) == [Trace(**RECORD)] * 2


def test_write_and_read_keep_every_key(tmp_path):
    traces = [Trace("q\u2028 \u00e9", "a <COMP>\n#### 2", "2", "gold", {"source": "s", "valid": True, "other": [1]})]
    write_jsonl(tmp_path / "new/t.jsonl", traces)
    assert read_traces(tmp_path / "new/t.jsonl") == traces
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["t.jsonl"]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "t.jsonl"
    write_jsonl(path, [Trace(**RECORD)])
    before = path.read_bytes()

    def broken():
        yield Trace(**RECORD)
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        write_jsonl(path, broken())
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def line(**changes):
    return json.dumps({key: value for key, value in (RECORD | changes).items() if value is not ...})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no records"),
        ("[]", "holds no records"),
        (line() + "\n{oops", "line 2: not valid JSON"),
        ("[1]", "record 1: expected an object, got int"),
        (line() + "\n" + line(answer=...), "line 2: key 'answer' is missing"),
        (line(question=3), "line 1: key 'question' must be text, got int"),
        (line(reasoning_with_compression=" "), "line 1: key 'reasoning_with_compression' is empty"),
        (f"[{line()}, {line(answer=None)}]", "record 2: key 'answer' is missing"),
        (line(answer=True), "key 'answer' must be text, got bool"),
    ],
)
def test_bad_files_are_named(tmp_path, content, message):
    path = tmp_path / "bad.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        read_traces(path)
    assert str(path) in str(caught.value)


def test_missing_and_binary_files_are_named(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        load_traces(str(tmp_path / "none"))
    (tmp_path / "b").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="UTF-8"):
        load_traces(str(tmp_path / "b"))


def test_numbers_are_accepted_as_answers(tmp_path):
    (tmp_path / "t").write_text(line(answer=2))
    assert read_traces(tmp_path / "t")[0].answer == "2"


@pytest.mark.parametrize(
    ("marked", "reasons"),
    [
        ("1 + 1 = 2 <COMP>\n#### 2", []),
        ("1 + 1 <COMP>\n= 2\n#### 2", []),
        ("**1 + 1 = 2** <COMP> - next\n#### 2 <COMP>", []),
        ("1 + 1 = 2 <COMP>\n- 3 more", ["missing_final_answer"]),
        ("1 + 1 = 2 <COMP>\n#### 3", ["wrong_answer"]),
        ("1 + 1 = 2\n#### 2", ["no_marker"]),
        ("a <COMP> " * 21 + "\n#### 2", ["too_many_markers"]),
        ("1<COMP>2 a\n#### 2", ["marker_in_number"]),
        ("1 <COMP>,234 a\n#### 2", ["marker_in_number"]),
        ("1.<COMP>5 a\n#### 2", ["marker_in_number"]),
        ("50 <COMP>% a\n#### 2", ["marker_in_number"]),
        ("48 + 24 <COMP> = 72\n#### 2", ["marker_in_equation"]),
        ("48 <COMP> + 24 = 72\n#### 2", ["marker_in_equation"]),
        ("48 + <COMP> 24 = 72\n#### 2", ["marker_in_equation"]),
        ("48 <COMP> - 24 = 24\n#### 2", ["marker_in_equation"]),
        ("48 <COMP> \\times 2 = 96\n#### 2", ["marker_in_equation"]),
        ("48/2 = <<48/2<COMP>=24>>24 a\n#### 2", ["marker_in_annotation"]),
        ("<COMP> a\n#### 2", ["empty_piece"]),
        ("a <COMP> <COMP> b\n#### 2", ["empty_piece"]),
    ],
)
def test_validate(marked, reasons):
    assert validate(Trace("q", marked, "2")) == reasons


def test_filter_counts_reasons():
    good, bad = Trace(**RECORD), Trace("q", "no", "2")
    kept, reasons = filter_valid([good, bad, bad])
    assert kept == [good]
    assert reasons == {"missing_final_answer": 2, "no_marker": 2}


def test_synthetic_traces_are_valid_and_prefix_stable():
    traces = synthetic_traces(100, seed=1, split="val")
    assert filter_valid(traces) == (traces, {})
    assert synthetic_traces(10, seed=1, split="val") == traces[:10]
    assert {trace.extra["annotator"] for trace in traces} == {"synthetic"}


def test_samples_are_what_the_generator_gives():
    lines = read_traces(SAMPLES / "traces.jsonl")
    assert lines == synthetic_traces(5)
    assert read_traces(SAMPLES / "traces.json") == synthetic_traces(3, seed=43)


@real_data
def test_real_traces_lose_about_a_tenth_to_wrong_answers():
    traces = read_traces(REAL)
    valid, reasons = filter_valid(traces)
    print(f"{len(valid)} of {len(traces)} valid, {dict(reasons)}")
    assert len(traces) == 800
    assert len(valid) == 729
    assert reasons == {"wrong_answer": 67, "missing_final_answer": 4}
    # Nothing was dropped for its form: of those that end in one number, none ends in the gold answer.
    kept = set(valid)
    last = [(re.findall(r"\d[\d,]*", trace.text)[-1].replace(",", ""), trace.answer) for trace in set(traces) - kept]
    assert len(last) == 71
    assert not [pair for pair in last if pair[0] == pair[1].replace(",", "")]
    assert sum(len(trace.marks) for trace in traces) / 800 == pytest.approx(5.17, abs=0.01)
