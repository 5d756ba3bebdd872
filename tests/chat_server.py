"""A real HTTP server that speaks the Chat Completions protocol and misbehaves as a test asks it to."""

import json
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self


@dataclass
class Answer:
    """What the server does with one request: a completion holding `text`, unless something else is set."""

    text: str | None = None
    status: int = 200
    error: str | None = None  # message of an error body
    code: str = ""
    body: bytes | None = None  # instead of everything above
    headers: dict[str, str] = field(default_factory=dict)
    finish: str = "stop"
    delay: float = 0.0  # seconds before the first byte
    drop: str = ""  # "before" or "within" the body


Behaviour = Callable[[str, int, dict[str, Any]], Answer]


def question(number: int) -> str:
    return f"What is {number} plus {number}?"


def right(text: str) -> str:
    """The solution of a question, validly marked."""
    number = int(re.findall(r"\d+", text)[0])
    return (
        f"First we add: {number} + {number} = {2 * number}. <COMP>\nThe sum is {2 * number}. <COMP>\n#### {2 * number}"
    )


def write_pool(path: Path, number: int, start: int = 10) -> Path:
    """Questions in the layout of GSM8K."""
    rows = (
        {"question": question(i), "answer": f"{i}+{i}=<<{i}+{i}={2 * i}>>{2 * i}\n#### {2 * i}"}
        for i in range(start, start + number)
    )
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


class ChatServer:
    """Answers every question rightly, or as `behave(question, n-th time this question is asked, body)` says."""

    def __init__(self, behave: Behaviour | None = None) -> None:
        self.behave = behave or (lambda text, time, body: Answer(right(text)))
        self.asked: Counter[str] = Counter()
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.times: list[float] = []
        self.done = self.now = self.peak = 0
        self.changed = threading.Condition()
        chat = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True
            wbufsize = -1

            def do_POST(self) -> None:
                chat.serve(self)

            def log_message(self, *arguments: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 64

            def handle_error(self, *arguments: object) -> None:
                """The client was killed or gave up: what the tests are about."""

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def serve(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        text = body["messages"][-1]["content"].rsplit("Problem: ", 1)[1]
        with self.changed:
            self.asked[text] += 1
            nth = self.asked[text]
            self.bodies.append(body)
            self.headers.append({name.lower(): value for name, value in handler.headers.items()})
            self.times.append(time.monotonic())
            self.now += 1
            self.peak = max(self.peak, self.now)
            self.changed.notify_all()
        try:
            answer = self.behave(text, nth, body)
            time.sleep(answer.delay)
        finally:
            with self.changed:
                self.now -= 1
        self._send(handler, answer)
        with self.changed:
            self.done += 1
            self.changed.notify_all()

    def _send(self, handler: BaseHTTPRequestHandler, answer: Answer) -> None:
        data = answer.body
        if data is None and answer.error is not None:
            data = json.dumps({"error": {"message": answer.error, "type": "x", "code": answer.code}}).encode()
        elif data is None:
            message = {"role": "assistant", "content": answer.text}
            usage = {"prompt_tokens": 100, "completion_tokens": 50, "total_tokens": 150}
            choice = {"index": 0, "finish_reason": answer.finish, "message": message}
            data = json.dumps({"id": "1", "object": "chat.completion", "choices": [choice], "usage": usage}).encode()
        if answer.drop != "before":
            handler.send_response(answer.status)
            for name, value in {"Content-Type": "application/json", **answer.headers}.items():
                handler.send_header(name, value)
            handler.send_header("Content-Length", str(len(data)))
            handler.end_headers()
            handler.wfile.write(data[: len(data) // 2] if answer.drop else data)
            handler.wfile.flush()
        if answer.drop:
            handler.connection.shutdown(socket.SHUT_RDWR)
            handler.close_connection = True


def one_sentence(captured: str) -> str:
    """What was written to standard error, which must be the one line of a user error."""
    assert captured.startswith("kvc: error: ")
    assert captured.count("\n") == 1
    return captured
