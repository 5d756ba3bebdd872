from pathlib import Path

import pytest

from kvc.data.annotate.base import read_gold
from kvc.data.annotate.categories import categorize, categorize_sentence
from kvc.data.annotate.rules import RulesAnnotator
from kvc.data.annotate.sentences import sentence_spans
from kvc.data.annotate.statistics import mark_statistics
from kvc.data.traces import Trace, filter_valid, read_traces, synthetic_traces, validate
from kvc.errors import UserError

SHARED = Path(__file__).parents[3] / "shared/data/gsm8k"
real_data = pytest.mark.skipif(not SHARED.exists(), reason=f"{SHARED} is not on this machine")
GOLD = "Tom had 48/2 = <<48/2=24>>24 clips in May.\nHe lost $1.50 a day\nSo he sold 48+24 = <<48+24=72>>72.\n#### 72"


def sentences(text):
    return [text[start:end] for start, end in sentence_spans(text)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One. Two!\nThree", ["One.", "Two!", "Three"]),
        ("It costs 1.5 now. End.", ["It costs 1.5 now.", "End."]),
        ("Mr. Ray has 3 oz. of salt. J. Poe too.", ["Mr. Ray has 3 oz. of salt.", "J. Poe too."]),
        ("2 * 100 sq.ft. = 200 sq.ft. of sod.\nB", ["2 * 100 sq.ft. = 200 sq.ft. of sod.", "B"]),
        ("a:\n30 - 5 = 25,\nso b.", ["a:\n30 - 5 = 25,\nso b."]),
        ("48 + 24\n= 72\nNext", ["48 + 24\n= 72", "Next"]),
        ("This gives\n3 + 4 = 7.", ["This gives\n3 + 4 = 7."]),
        ("1. First = 2\n2. Second = 3", ["1. First = 2", "2. Second = 3"]),
        ("a:\n\nb", ["a:", "b"]),
        ("", []),
    ],
)
def test_sentence_spans(text, expected):
    assert sentences(text) == expected


@pytest.mark.parametrize(
    ("sentence", "category"),
    [
        ("5 + 4 = 9 pens", "calculation_result"),
        ("so the sum equals $9", "calculation_result"),
        ("\\[ x = \\frac{1}{2} \\]", "display_math_end"),
        ("Thus, she spends $4 a day.", "intermediate_conclusion"),
        ("There are 60 minutes in an hour.", "stated_fact"),
        ("Keep in mind: Karl has 30 buttons.", "setup"),
        ("Next, we add the 3 costs:", "setup"),
        ("The total is:", "setup"),
        ("Final answer: #### 7", "final_answer"),
        ("Nice work.", "other"),
    ],
)
def test_categories(sentence, category):
    assert categorize_sentence(sentence) == category


def test_category_of_a_mark_reads_the_last_sentence():
    text = "There are 3 cats. 3 + 4 = 7."
    assert categorize(text, 17) == "stated_fact"
    assert categorize(text, len(text)) == "calculation_result"


def test_gold_reasoning_is_marked_without_touching_it():
    trace = RulesAnnotator().annotate("q", "72", GOLD)
    assert trace.original_reasoning == GOLD
    assert trace.reasoning_with_compression == (
        "Tom had 48/2 = 24 clips in May. <COMP>\nHe lost $1.50 a day <COMP>\nSo he sold 48+24 = 72. <COMP>\n#### 72"
    )
    assert validate(trace) == []


def test_missing_final_line_is_added():
    assert RulesAnnotator().annotate("q", "7", "3 + 4 = 7").text == "3 + 4 = 7\n#### 7"


def test_facts_are_given_up_before_results():
    reasoning = "".join(f"There are {i} cats.\n{i} + 1 = {i + 1}\n" for i in range(15)) + "#### 15"
    trace = RulesAnnotator().annotate("q", "15", reasoning)
    assert len(trace.marks) == 20
    assert mark_statistics([trace]).categories == {"calculation_result": 15, "stated_fact": 5}


def test_rules_agree_with_the_generator():
    hits = marked = true = 0
    for truth in synthetic_traces(500, seed=11):
        trace = RulesAnnotator().annotate(truth.question, truth.answer, truth.original_reasoning)
        assert trace.text == truth.text
        hits += len(set(trace.marks) & set(truth.marks))
        marked, true = marked + len(trace.marks), true + len(truth.marks)
    print(f"rules against generated marks: precision {hits / marked:.3f}, recall {hits / true:.3f}")
    # The generator leaves out marks whose number the next calculation needs; no rule on the sentence alone sees that.
    assert hits / true > 0.97
    assert 0.5 < hits / marked < 0.7


@real_data
def test_all_real_gold_solutions_become_valid():
    golds = list(read_gold(str(SHARED / "train.jsonl")))
    annotator = RulesAnnotator()
    traces = [annotator.annotate(gold.question, gold.answer, gold.reasoning) for gold in golds[:2000]]
    valid, reasons = filter_valid(traces)
    assert reasons == {}
    assert len(valid) == 2000
    assert not any("<<" in trace.text for trace in traces)
    assert 3 < mark_statistics(traces).mean < 4.5


@real_data
def test_real_marks_mostly_follow_calculations():
    statistics = mark_statistics(read_traces(SHARED / "gsm8k_compressed_train.json"))
    share = {category: count / statistics.marks for category, count in statistics.categories.items()}
    print({category: f"{value:.1%}" for category, value in share.items()})
    assert 0.70 < share["calculation_result"] < 0.80
    assert 0.08 < share["stated_fact"] < 0.13
    assert 0.05 < share["display_math_end"] < 0.09
    assert 0.03 < share["intermediate_conclusion"] < 0.08
    assert share["other"] < 0.02


def test_statistics_count_every_mark():
    statistics = mark_statistics([Trace("q", "1 + 1 = 2 <COMP>\nx <COMP>\n#### 2", "2"), Trace("q", "#### 2", "2")])
    assert (statistics.traces, statistics.marks, statistics.mean) == (2, 2, 1.0)
    assert statistics.histogram == {2: 1, 0: 1}
    assert statistics.categories == {"calculation_result": 1, "other": 1}
    assert statistics.positions == [9 / 18, 11 / 18]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"question": "q", "answer": "no final line"}', "no final line"),
        ('{"answer": "#### 2"}', "key 'question' is missing"),
        ('{"question": "q", "answer": []}', "key 'answer' must be text"),
    ],
)
def test_bad_gold_rows_are_named(tmp_path, content, message):
    path = tmp_path / "gold.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        list(read_gold(str(path)))
    assert f"{path} line 1" in str(caught.value)
