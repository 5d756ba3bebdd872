"""A server that misbehaves on demand, and the command that talks to it."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from chat_server import Behaviour, ChatServer, write_pool

from kvc.__main__ import main

Run = Callable[..., int]


@pytest.fixture
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("OPENAI_") or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)


@pytest.fixture
def run(tmp_path: Path, clean_environment: None) -> Run:
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
