"""`annotate --annotator openai`: hopeless servers, bad input, the key."""

import json
import logging
import threading
from pathlib import Path
from typing import Any

import pytest
from chat_server import Answer, one_sentence, right, write_pool

from kvc.data.annotate.chat.endpoint import Endpoint
from kvc.data.traces import read_traces

KEY = "sk-test-0123456789abcdefghij"


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


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


# ---------------------------------------------------------------------------------- two at once


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
