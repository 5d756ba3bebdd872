from pathlib import Path

import pytest

from kvc.commands.annotate import main
from kvc.data.traces import read_traces, synthetic_traces
from kvc.errors import UserError

SAMPLES = Path(__file__).parents[2] / "data/samples"


def test_gsm8k_layout_becomes_valid_traces(tmp_path, capsys):
    output = tmp_path / "t.jsonl"
    assert main(["--input", str(SAMPLES / "gsm8k.jsonl"), "--output", str(output)]) == 0
    traces = read_traces(output)
    assert [len(trace.marks) for trace in traces] == [2, 3]
    assert all(trace.extra == {"source": "gsm8k.jsonl", "annotator": "rules", "valid": True} for trace in traces)
    assert "2 traces" in capsys.readouterr().out


def test_synthetic_keeps_the_generators_marks(tmp_path):
    output = tmp_path / "t.jsonl"
    arguments = ["--annotator", "synthetic", "--input", "synthetic:reasoning", "--num_samples", "4", "--split", "test"]
    main([*arguments, "--seed", "5", "--output", str(output)])
    assert read_traces(output) == synthetic_traces(4, 5, "test")


def test_rules_on_synthetic_and_on_a_trace_file_agree(tmp_path):
    one, two = tmp_path / "1.jsonl", tmp_path / "2.jsonl"
    main(["--input", "synthetic:reasoning", "--num_samples", "5", "--output", str(one)])
    main(["--input", str(SAMPLES / "traces.jsonl"), "--output", str(two)])
    assert read_traces(one) == read_traces(two)
    assert read_traces(one)[0].extra["annotator"] == "rules"


def test_invalid_traces_are_dropped_and_counted(tmp_path, capsys):
    rows = '{"question": "q", "answer": "Nothing here.\\n#### 2"}\n{"question": "q", "answer": "1 + 1 = 2\\n#### 2"}\n'
    (tmp_path / "in").write_text(rows)
    main(["--input", str(tmp_path / "in"), "--num_samples", "1", "--output", str(tmp_path / "out")])
    assert len(read_traces(tmp_path / "out")) == 1
    assert "no_marker: 1" in capsys.readouterr().out


def test_nothing_valid_writes_nothing(tmp_path):
    (tmp_path / "in").write_text('{"question": "q", "answer": "Nothing here.\\n#### 2"}\n')
    with pytest.raises(UserError, match="no valid trace"):
        main(["--input", str(tmp_path / "in"), "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_existing_output_is_kept_without_overwrite(tmp_path):
    output = tmp_path / "t.jsonl"
    output.write_text("mine")
    arguments = ["--input", str(SAMPLES / "gsm8k.jsonl"), "--output", str(output)]
    with pytest.raises(UserError, match="--overwrite"):
        main(arguments)
    assert output.read_text() == "mine"
    main([*arguments, "--overwrite"])
    assert len(read_traces(output)) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--input", "x"], "--input and --output"),
        (["--annotator", "synthetic", "--input", "x", "--output", "y"], "needs --input synthetic:reasoning"),
        (["--input", "synthetic:poems", "--output", "y"], "only synthetic source"),
        (["--input", "nope.jsonl", "--output", "y"], "nope.jsonl: no such file"),
        (["--analyze_only", "x", "--output", "y"], "--analyze_only takes neither"),
        (["--input", "x", "--output", "."], "is a folder"),
    ],
)
def test_bad_arguments_give_one_sentence(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        main(arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("arguments", [["--num_samples", "0"], ["--annotator", "magic"]])
def test_argparse_errors_give_one_sentence(arguments):
    with pytest.raises(UserError, match=arguments[0]):
        main(arguments)


def test_analyze_only_prints_histogram_and_categories(capsys):
    assert main(["--analyze_only", str(SAMPLES / "traces.jsonl")]) == 0
    printed = capsys.readouterr().out
    assert "COMP per trace" in printed
    assert "calculation_result" in printed
