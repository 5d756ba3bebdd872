"""`annotate --annotator openai` against a server on this machine: results, troubles that pass, invalid replies."""

import itertools
import json
import time
from email.utils import formatdate
from typing import Any

import pytest
from chat_server import Answer, Behaviour, one_sentence, question, right

from kvc.data.annotate.chat.annotator import OpenAIAnnotator
from kvc.data.annotate.chat.endpoint import Endpoint
from kvc.data.traces import Trace, read_traces, validate


def first_time(trouble: Answer) -> Behaviour:
    """Trouble with the very first request, then none."""
    pending = [trouble]
    return lambda text, nth, body: pending.pop() if pending else Answer(right(text))


# ---------------------------------------------------------------------------------- what comes out


def test_only_as_many_questions_as_needed(tmp_path, serve, run, capsys) -> None:
    server = serve()
    assert run(server) == 0
    traces = read_traces(tmp_path / "out.jsonl")
    assert len({trace.question for trace in traces}) == 5 == len(traces) == len(server.bodies)
    assert [validate(trace) for trace in traces] == [[]] * 5
    gold = traces[0].original_reasoning
    assert "<<" in gold
    assert traces[0].extra == {"source": "pool.jsonl", "annotator": "openai", "model": "gpt-4o-mini", "valid": True}
    assert "5 traces, 2.00 COMP each" in capsys.readouterr().out
    sent = server.bodies[0]
    assert (sent["model"], sent["temperature"], sent["max_tokens"]) == ("gpt-4o-mini", 0.3, 1024)
    assert gold not in sent["messages"][0]["content"]


def test_summary_counts_tokens_and_cost(tmp_path, serve, run, capsys) -> None:
    assert run(serve(), "--price_input", "2", "--price_output", "10") == 0
    summary = json.loads((tmp_path / "out.jsonl.summary.json").read_text())
    assert (summary["written"], summary["pool"], summary["requests"]) == (5, 12, 5)
    assert (summary["tokens_in"], summary["tokens_out"]) == (500, 250)
    assert summary["cost_usd"] == pytest.approx((500 * 2 + 250 * 10) / 1e6)
    assert "tokens 500 in, 250 out, about $0.0035" in capsys.readouterr().out


def test_the_order_of_replies_does_not_matter(tmp_path, serve, run) -> None:
    bad = {question(i) for i in (12, 15, 18)}

    def behave(text: str, nth: int, body: dict[str, Any]) -> Answer:
        return Answer("#### 1" if text in bad else right(text), delay=0.01 * (int(text.split()[2]) % 4))

    assert run(serve(behave), number=7) == 0
    many = (tmp_path / "out.jsonl").read_bytes()
    assert run(serve(behave), "--concurrency", "1", "--overwrite", number=7) == 0
    assert (tmp_path / "out.jsonl").read_bytes() == many


def test_concurrency_is_bounded_and_used(tmp_path, serve, run) -> None:
    server = serve(lambda text, nth, body: Answer(right(text), delay=0.05))
    assert run(server, "--concurrency", "3", number=12) == 0
    assert 1 < server.peak <= 3


def test_a_larger_number_adds_to_what_is_there(tmp_path, serve, run, capsys) -> None:
    server = serve()
    assert run(server, number=3) == 0
    three = (tmp_path / "out.jsonl").read_text()
    assert run(server, number=8) == 0
    assert (tmp_path / "out.jsonl").read_text().startswith(three)
    assert len(server.bodies) == 8 == len(read_traces(tmp_path / "out.jsonl"))
    assert run(server, number=8) == 0
    assert len(server.bodies) == 8
    capsys.readouterr()
    assert run(server, number=2) == 2
    assert "already holds 8" in one_sentence(capsys.readouterr().err)


# ---------------------------------------------------------------------------------- troubles that pass


@pytest.mark.parametrize(
    "trouble",
    [
        Answer(status=408, error="slow"),
        Answer(status=409, error="locked"),
        Answer(status=429, error="too many"),
        Answer(status=500, error="oops"),
        Answer(status=503, body=b"<html>gateway</html>"),
        Answer("x", drop="before"),
        Answer("x", drop="within"),
        Answer(body=b'{"choices": [{"message": {"role": "assist'),
        Answer(body=b'{"error": {"message": "upstream is down"}}'),
        Answer(body=b"[]"),
    ],
    ids=["408", "409", "429", "500", "503", "dropped", "dropped_within", "truncated", "error_as_200", "list"],
)
def test_troubles_that_pass(trouble, tmp_path, serve, run) -> None:
    server = serve(first_time(trouble))
    assert run(server) == 0
    assert len(read_traces(tmp_path / "out.jsonl")) == 5
    assert len(server.bodies) == 6
    assert json.loads((tmp_path / "out.jsonl.summary.json").read_text())["requests"] == 6


def test_time_out(tmp_path, serve, run) -> None:
    server = serve(first_time(Answer("late", delay=4)))
    assert run(server, "--timeout", "1") == 0
    assert len(server.bodies) >= 6
    assert "late" not in (tmp_path / "out.jsonl.journal.jsonl").read_text()
    assert len(read_traces(tmp_path / "out.jsonl")) == 5


@pytest.mark.parametrize("as_date", [False, True], ids=["seconds", "date"])
def test_retry_after_holds_back_every_request(as_date, tmp_path, serve, run) -> None:
    since: list[float] = []
    asked = 3 if as_date else 1

    def behave(text: str, nth: int, body: dict[str, Any]) -> Answer:
        if since:
            return Answer(right(text))
        since.append(time.monotonic())
        value = formatdate(time.time() + asked, usegmt=True) if as_date else str(asked)
        return Answer(status=429, error="too many", headers={"Retry-After": value})

    server = serve(behave)
    assert run(server) == 0
    # Dates have whole seconds: both the date and the clock of the server are cut.
    shortest = min(server.times[1:]) - since[0]
    assert shortest >= asked - 1 if as_date else shortest >= asked


def test_too_long_a_wait_stops(tmp_path, serve, run, capsys) -> None:
    server = serve(lambda text, nth, body: Answer(status=429, error="quota", headers={"Retry-After": "86400"}))
    assert run(server) == 2
    assert "asks to wait 86400 s" in one_sentence(capsys.readouterr().err)
    assert len(server.bodies) == 1


def test_an_outage_stops_and_the_same_command_goes_on(tmp_path, serve, run, capsys) -> None:
    def behave(text: str, nth: int, body: dict[str, Any]) -> Answer:
        # Counted when asked: two requests in flight must not both be the fourth.
        return Answer(right(text)) if next(asked) < 4 or up else Answer(status=500, error="down")

    asked = itertools.count()
    up: list[bool] = []
    server = serve(behave)
    assert run(server, "--max_attempts", "2", "--concurrency", "2", number=10) == 2
    message = one_sentence(capsys.readouterr().err)
    assert "3 questions in a row got no answer" in message
    assert "4 valid traces are kept" in message
    assert not (tmp_path / "out.jsonl").exists()
    up.append(True)
    before = len(server.bodies)
    assert run(server, number=10) == 0
    assert len(server.bodies) == before + 6
    assert len({trace.question for trace in read_traces(tmp_path / "out.jsonl")}) == 10


# ---------------------------------------------------------------------------------- replies that are no traces

JSON = '{"reasoning_with_compression": '


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (Answer("First we add the two numbers: 10 + 10 = 20. <COMP>\nDone. <COMP>\n#### 7"), "wrong_answer"),
        (Answer("First we add the numbers: 1<COMP>0 + 10 = 20.\n#### {}"), "marker_in_number"),
        (Answer("First we add the numbers: 10 + 10 <COMP> = 20.\n#### {}"), "marker_in_equation"),
        (Answer("First we add the numbers: 10 + 10 = 20.\n#### {}"), "no_marker"),
        (Answer("First we add the numbers: 10 + 10 = 20. <COMP><COMP>\n#### {}"), "empty_piece"),
        (Answer("First we add the numbers: they make 20. <COMP>\n#### many"), "missing_final_answer"),
        (Answer("So: <COMP>\n#### {}"), "no_reasoning"),
        (Answer("First we add the numbers: 10 + 10 = 20. <COMP>\nDone. <COMP\n#### {}"), "broken_marker"),
        (Answer("We add the numbers: 10 + 10 = 20. <COMP>\n#### {}\nI hope this helps!"), "text_after_answer"),
        (Answer("We add the numbers: 10 + 10 = 20.\n" * 6 + "<COMP>\n#### {}"), "repetitive"),
        (Answer(JSON + '"First we add'), "malformed_json"),
        (Answer(JSON + "3}"), "malformed_json"),
        (Answer("First we add", finish="length"), "truncated"),
        (Answer("", finish="content_filter"), "refused"),
        (Answer(""), "empty_reply"),
        (Answer(None), "empty_reply"),
    ],
)
def test_invalid_replies_are_replaced_and_counted(answer, reason, tmp_path, serve, run, capsys) -> None:
    bad = {question(i) for i in range(10, 14)}

    def behave(text: str, nth: int, body: dict[str, Any]) -> Answer:
        if text not in bad:
            return Answer(right(text))
        number = right(text).rsplit(" ", 1)[1]
        return Answer(answer.text and answer.text.replace("{}", number), finish=answer.finish)

    assert run(serve(behave), "--ask_again", "0", number=8) == 0
    traces = read_traces(tmp_path / "out.jsonl")
    assert {trace.question for trace in traces} == {question(i) for i in range(14, 22)}
    summary = json.loads((tmp_path / "out.jsonl.summary.json").read_text())
    assert summary["reasons"] == {reason: summary["rejected"]}
    assert f"{reason} {summary['rejected']}" in capsys.readouterr().out


def test_an_exhausted_pool_says_how_many_and_why(tmp_path, serve, run, capsys) -> None:
    def behave(text: str, nth: int, body: dict[str, Any]) -> Answer:
        number = int(text.split()[2])
        wrong = number < 12 or (number < 15 and nth == 1)
        return Answer(right(text) + "1" if wrong else right(text))

    server = serve(behave)
    assert run(server, number=40) == 0
    assert len(read_traces(tmp_path / "out.jsonl")) == 10  # three came right when asked again, two did not
    assert max(server.asked.values()) == 2
    said = capsys.readouterr().out
    assert "10 of 40 valid traces: all 12 questions were asked; not valid: wrong_answer 7" in said


def test_nothing_valid_writes_nothing(tmp_path, serve, run, capsys) -> None:
    assert run(serve(lambda text, nth, body: Answer("#### 1"))) == 2
    assert "no valid trace" in one_sentence(capsys.readouterr().err)
    assert not (tmp_path / "out.jsonl").exists()


# ---------------------------------------------------------------------------------- structured output


def test_json_objects_are_asked_for_and_read(tmp_path, serve, run) -> None:
    server = serve(lambda text, nth, body: Answer(json.dumps({"reasoning_with_compression": right(text)})))
    assert run(server) == 0
    assert all(body["response_format"]["type"] == "json_schema" for body in server.bodies)
    assert {trace.reasoning_with_compression for trace in read_traces(tmp_path / "out.jsonl")} <= {
        right(question(i)) for i in range(10, 22)
    }


def test_a_server_without_structured_output_is_told_once(tmp_path, serve, run) -> None:
    def behave(text: str, nth: int, body: dict[str, Any]) -> Answer:
        if "response_format" in body:
            return Answer(status=400, error="response_format: json_schema is not supported")
        return Answer(right(text))

    server = serve(behave)
    assert run(server) == 0
    assert ["response_format" in body for body in server.bodies] == [True] + [False] * 5
    assert run(server, number=8) == 0
    assert sum("response_format" in body for body in server.bodies) == 1


def test_the_newer_name_of_max_tokens(serve, run) -> None:
    def behave(text: str, nth: int, body: dict[str, Any]) -> Answer:
        if "max_tokens" in body:
            return Answer(status=400, error="Unsupported parameter: use 'max_completion_tokens' instead.")
        return Answer(right(text))

    server = serve(behave)
    assert run(server) == 0
    assert [body.get("max_completion_tokens") for body in server.bodies] == [None] + [1024] * 5


# ---------------------------------------------------------------------------------- as a library


def test_the_annotator_alone(serve) -> None:
    trace = OpenAIAnnotator(Endpoint(serve().url)).annotate(question(4), "8", "gold")
    assert trace == Trace(question(4), right(question(4)), "8", "gold", {"annotator": "openai", "model": "gpt-4o-mini"})
