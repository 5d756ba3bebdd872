"""SIGKILL at random moments: what was paid for is kept, and nothing is there twice."""

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

from chat_server import Answer, ChatServer, right, write_pool

from kvc.data.traces import read_traces

KILLS = 20
CONCURRENCY = 4
NUMBER = 130

# Importing the client library takes a second, so one process imports it and forks one victim for every line it reads.
NURSERY = """
import os, sys
import openai, openai.resources.chat.completions, rich.progress
import kvc.commands.annotate, kvc.data.annotate.chat.run, kvc.data.annotate.statistics
from kvc.__main__ import main
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        os._exit(main(sys.argv[1:]))
    print(child, flush=True)
    _, status = os.waitpid(child, 0)
    print(os.waitstatus_to_exitcode(status), flush=True)
"""


def test_twenty_kills_lose_nothing_and_repeat_nothing(tmp_path: Path) -> None:
    pool, output = write_pool(tmp_path / "pool.jsonl", 150), tmp_path / "out.jsonl"
    journal = tmp_path / "out.jsonl.journal.jsonl"
    rng = random.Random(7)
    kept: list[int] = []
    interrupting, interrupted = threading.Event(), threading.Event()
    answers = itertools.count()

    def answer(text: str, nth: int, body: object) -> Answer:
        if interrupting.is_set() and next(answers) >= 3:
            # However late the interruption comes, there is something left to interrupt.
            interrupted.wait(60)
        return Answer(right(text), delay=rng.uniform(0, 0.02))

    with ChatServer(answer) as server:
        options = ["--input", pool, "--output", output, "--base_url", server.url, "--num_samples", str(NUMBER)]
        command = [sys.executable, "-c", NURSERY, "annotate", "--annotator", "openai", *map(str, options)]
        environment = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
        with subprocess.Popen([*command, "--concurrency", str(CONCURRENCY)], env=environment, **pipes) as nursery:
            assert nursery.stdin is not None
            assert nursery.stdout is not None

            def start() -> int:
                print("go", file=nursery.stdin, flush=True)
                return int(nursery.stdout.readline())

            def exit_code() -> int:
                while not (line := nursery.stdout.readline().strip()).lstrip("-").isdigit():
                    assert line or nursery.poll() is None, "the nursery died"
                return int(line)

            for _ in range(KILLS):
                child = start()
                enough = server.done + rng.randrange(6)
                with server.changed:
                    assert server.changed.wait_for(lambda: server.done >= enough, 60)  # noqa: B023
                    server.changed.wait(rng.uniform(0, 0.02))
                os.kill(child, signal.SIGKILL)
                assert exit_code() == -signal.SIGKILL
                assert not output.exists()
                kept.append(len(journal.read_bytes().split(b"\n")) - 2 if journal.exists() else 0)
            interrupting.set()
            child, enough = start(), server.done + 3
            with server.changed:
                assert server.changed.wait_for(lambda: server.done >= enough, 60)
            os.kill(child, signal.SIGINT)
            interrupted.set()
            assert exit_code() == 130
            start()
            assert exit_code() == 0
    assert kept == sorted(kept)
    assert kept[-1] > KILLS  # the kills hit runs that had got on
    traces = read_traces(output)
    assert len({trace.question for trace in traces}) == NUMBER == len(traces)
    keys = Counter(json.loads(line)["key"] for line in journal.read_text().splitlines()[1:])
    assert set(keys.values()) == {1}
    assert len(keys) == NUMBER
    # Only what was in flight at a kill was asked for again.
    repeated = sum(server.asked.values()) - NUMBER
    print(f"{KILLS} kills: {repeated} requests repeated, journal lines after each: {kept}")
    assert repeated <= (KILLS + 1) * CONCURRENCY
