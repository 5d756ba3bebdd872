"""`annotate --annotator openai` against a server on this machine: troubles, resume, bounds, secrets."""

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest
from chat_server import Answer, Behaviour, ChatServer, question, right, write_pool

from kvc.__main__ import main
from kvc.data.annotate.chat.annotator import OpenAIAnnotator
from kvc.data.annotate.chat.endpoint import Endpoint
from kvc.data.traces import Trace, read_traces, validate

KEY = "sk-test-0123456789abcdefghij"
Run = Callable[..., int]


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("OPENAI_") or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Runs the command over a pool of 12 questions with short waits."""
    write_pool(tmp_path / "pool.jsonl", 12)

    def start(server: ChatServer | str, *options: str, number: int | None = 5) -> int:
        url = server if isinstance(server, str) else server.url
        wanted = [] if number is None else ["--num_samples", str(number)]
        paths = ["--input", str(tmp_path / "pool.jsonl"), "--output", str(tmp_path / "out.jsonl")]
        few = ["--backoff", "0.01", "--timeout", "20"]
        return main(["annotate", "--annotator", "openai", *paths, "--base_url", url, *wanted, *few, *options])

    return start


@pytest.fixture
def serve() -> Iterator[Callable[[Behaviour | None], ChatServer]]:
    servers: list[ChatServer] = []

    def start(behave: Behaviour | None = None) -> ChatServer:
        servers.append(ChatServer(behave).__enter__())
        return servers[-1]

    yield start
    for server in servers:
        server.__exit__()


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def first_time(trouble: Answer) -> Behaviour:
    """Trouble with the very first request, then none."""
    pending = [trouble]
    return lambda text, nth, body: pending.pop() if pending else Answer(right(text))


def one_sentence(captured: str) -> str:
    assert captured.startswith("kvc: error: ")
    assert captured.count("\n") == 1
    return captured


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
        return Answer(status=500, error="down") if server.done >= 4 and not up else Answer(right(text))

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


# ---------------------------------------------------------------------------------- troubles that stay


@pytest.mark.parametrize(
    ("answer", "requests", "message"),
    [
        (Answer(status=401, error=f"Incorrect API key provided: {KEY}"), 1, "OPENAI_API_KEY is not accepted"),
        (Answer(status=403, error="Country not supported"), 1, "403: Country not supported"),
        (Answer(status=404, error="The model 'x' does not exist"), 1, "404: The model 'x' does not exist"),
        (Answer(status=429, error="no credit", code="insufficient_quota"), 1, "no credit"),
        (Answer(status=400, error="temperature is unsupported"), 3, "temperature is unsupported"),
    ],
    ids=["401", "403", "404", "quota", "400"],
)
def test_hopeless_servers_stop_at_once(answer, requests, message, tmp_path, serve, run, capsys, monkeypatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server = serve(lambda text, nth, body: answer)
    assert run(server, "--concurrency", "1") == 2
    said = one_sentence(capsys.readouterr().err)
    assert message in said
    assert KEY not in said
    assert len(server.bodies) == requests
    assert not (tmp_path / "out.jsonl").exists()
    if requests == 1:
        assert [path.name for path in tmp_path.iterdir()] == ["pool.jsonl"]


def test_many_tasks_make_one_request_to_a_hopeless_server(serve, run) -> None:
    server = serve(lambda text, nth, body: Answer(status=401, error="no"))
    assert run(server, "--concurrency", "8") == 2
    assert len(server.bodies) == 1


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/v1", "http://no-such-host.invalid/v1"])
def test_an_unreachable_server(url, tmp_path, run, capsys, monkeypatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr("warnings.warn", lambda *arguments, **settings: None)
    assert run(url) == 2
    assert f"{url} cannot be reached" in one_sentence(capsys.readouterr().err)
    assert [path.name for path in tmp_path.iterdir()] == ["pool.jsonl"]


def test_a_key_that_expires_loses_nothing(tmp_path, serve, run, capsys) -> None:
    def behave(text: str, nth: int, body: dict[str, Any]) -> Answer:
        return Answer(status=401, error="expired") if server.done >= 4 and not renewed else Answer(right(text))

    renewed: list[bool] = []
    server = serve(behave)
    assert run(server, "--concurrency", "1", number=9) == 2
    assert "4 valid traces are kept" in one_sentence(capsys.readouterr().err)
    renewed.append(True)
    assert run(server, number=9) == 0
    assert len(server.bodies) == 10
    assert len({trace.question for trace in read_traces(tmp_path / "out.jsonl")}) == 9


# ---------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--base_url", "https://api.example.com/v1"], "OPENAI_API_KEY is not set"),
        (["--base_url", "localhost:8000"], "expected something like http"),
        (["--base_url", "http://me:secret@localhost:1"], "neither password nor query"),
        (["--base_url", "http://localhost:99999"], "no valid address"),
        (["--input", "synthetic:reasoning"], "--annotator synthetic"),
        (["--concurrency", "0"], "--concurrency"),
        (["--temperature", "nan"], "--temperature"),
        (["--timeout", "0"], "--timeout"),
    ],
)
def test_bad_arguments_give_one_sentence(options, message, tmp_path, run, capsys) -> None:
    assert run("http://127.0.0.1:9/v1", *options) == 2
    said = one_sentence(capsys.readouterr().err)
    assert message in said
    assert "secret" not in said
    assert [path.name for path in tmp_path.iterdir()] == ["pool.jsonl"]


def test_other_settings_are_refused(tmp_path, serve, run, capsys) -> None:
    server = serve()
    assert run(server) == 0
    before = (tmp_path / "out.jsonl.journal.jsonl").read_bytes()
    for options, key in (
        (["--model", "other"], "model"),
        (["--temperature", "0.7"], "temperature"),
        (["--max_tokens", "99"], "max_tokens"),
        (["--seed", "1"], "seed"),
    ):
        capsys.readouterr()
        assert run(server, *options) == 2
        assert f"another {key} (" in one_sentence(capsys.readouterr().err)
    write_pool(tmp_path / "pool.jsonl", 13)
    assert run(server) == 2
    assert "another content of the input" in one_sentence(capsys.readouterr().err)
    assert (tmp_path / "out.jsonl.journal.jsonl").read_bytes() == before
    assert run(server, "--model", "other", "--overwrite") == 0
    assert {trace.extra["model"] for trace in read_traces(tmp_path / "out.jsonl")} == {"other"}
    assert len(lines(tmp_path / "out.jsonl.journal.jsonl")) == 6


def test_a_foreign_output_is_kept(tmp_path, serve, run, capsys) -> None:
    (tmp_path / "out.jsonl").write_text('{"question": "mine"}\n')
    server = serve()
    assert run(server) == 2
    assert "--overwrite" in one_sentence(capsys.readouterr().err)
    assert (tmp_path / "out.jsonl").read_text() == '{"question": "mine"}\n'
    assert server.bodies == []


def test_a_failed_start_keeps_what_overwrite_would_replace(tmp_path, serve, run, capsys) -> None:
    assert run(serve()) == 0
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert run(serve(lambda text, nth, body: Answer(status=401, error="no")), "--overwrite") == 2
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_options_without_effect_warn(tmp_path, run) -> None:
    with pytest.warns(UserWarning, match="has no effect") as warned:
        assert run("http://x", "--annotator", "rules", "--model", "m", number=2) == 0
    said = sorted(str(warning.message) for warning in warned)
    assert said == [
        f"--{name} has no effect with --annotator rules" for name in ("backoff", "base_url", "model", "timeout")
    ]


# ---------------------------------------------------------------------------------- the key


def test_the_key_is_sent_and_appears_nowhere(tmp_path, serve, run, capsys, caplog, monkeypatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", f" {KEY}\n")
    caplog.set_level(logging.DEBUG)

    def behave(text: str, nth: int, body: dict[str, Any]) -> Answer:
        if nth == 1:  # some servers repeat what they were sent
            return Answer(status=500, error=f"Bearer {KEY} is at its limit")
        if "7" in text or "8" in text:
            return Answer(status=422, error=f"{KEY} must not ask this")
        return Answer(f"The key {KEY} says: 3 + 4. <COMP>\n#### 1" if "9" in text else right(text))

    server = serve(behave)
    assert run(server, number=None) == 0
    assert {headers["authorization"] for headers in server.headers} == {f"Bearer {KEY}"}
    captured = capsys.readouterr()
    texts = [captured.out, captured.err, caplog.text, *(path.read_text() for path in tmp_path.iterdir())]
    journal = (tmp_path / "out.jsonl.journal.jsonl").read_text()
    assert "[key] must not ask this" in journal
    assert "The key [key] says" in journal
    assert [KEY in text for text in texts] == [False] * len(texts)
    assert KEY not in repr(Endpoint("u", KEY))


def test_no_key_is_needed_on_this_machine(serve, run) -> None:
    server = serve()
    assert run(server) == 0
    assert {headers["authorization"] for headers in server.headers} == {"Bearer none"}


# ---------------------------------------------------------------------------------- as a library


def test_the_annotator_alone(serve) -> None:
    trace = OpenAIAnnotator(Endpoint(serve().url)).annotate(question(4), "8", "gold")
    assert trace == Trace(question(4), right(question(4)), "8", "gold", {"annotator": "openai", "model": "gpt-4o-mini"})


def test_two_processes_do_not_share_an_output(tmp_path, serve, run, capsys) -> None:
    assert run(serve(), number=2) == 0
    gate = threading.Event()

    def behave(text: str, nth: int, body: dict[str, Any]) -> Answer:
        gate.wait(10)
        return Answer(right(text))

    server = serve(behave)
    first = threading.Thread(target=run, args=(server,))
    first.start()
    with server.changed:
        assert server.changed.wait_for(lambda: server.bodies, 10)
    capsys.readouterr()
    assert run(server) == 2
    assert "another process is writing" in one_sentence(capsys.readouterr().err)
    gate.set()
    first.join()
    assert len(read_traces(tmp_path / "out.jsonl")) == 5
