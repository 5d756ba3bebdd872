"""What is read from a reply, when to ask again, and which addresses and keys are taken."""

import io
import json
import sys
from email.utils import formatdate
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from kvc.data.annotate.base import read_gold
from kvc.data.annotate.chat.endpoint import Endpoint, endpoint
from kvc.data.annotate.chat.outcome import Outcome
from kvc.data.annotate.chat.progress import CollectionProgress
from kvc.data.annotate.chat.prompt import PROMPT, SCHEMA, messages
from kvc.data.annotate.chat.reply import implausible, read_reply
from kvc.data.annotate.chat.retry import Retry, is_retried, retry_after
from kvc.data.annotate.chat.tally import Tally, prices_of
from kvc.data.traces import Trace, filter_valid, read_traces, validate
from kvc.errors import UserError

SHARED = Path(__file__).parents[3] / "shared/data/gsm8k/gsm8k_compressed_train.json"
SOLUTION = "Ann has 3 + 4 = 7 pens. <COMP>\nShe gives 2 away, 7 - 2 = 5. <COMP>\n#### 5"


def body(content: Any, **choice: Any) -> dict[str, Any]:
    return {
        "choices": [{"message": {"role": "assistant", "content": content}, **choice}],
        "usage": {"prompt_tokens": 3},
    }


@pytest.mark.parametrize(
    "content",
    [
        SOLUTION,
        f"\n{SOLUTION}\n\n",
        SOLUTION.replace("\n", "\r\n"),
        f"<think>\nHm, 7? <COMP>\n</think>\n\n{SOLUTION}",
        f"```\n{SOLUTION}\n```",
        json.dumps({"reasoning_with_compression": SOLUTION}),
        f'```json\n{{"reasoning_with_compression": "{SOLUTION}"}}\n```',  # raw line breaks, as small models write them
        [{"type": "text", "text": SOLUTION[:20]}, {"type": "text", "text": SOLUTION[20:]}],
    ],
)
def test_forms_of_one_solution(content: Any) -> None:
    reply = read_reply(body(content, finish_reason="stop"))
    assert reply is not None
    assert (reply.text, reply.reasons, reply.tokens_in, reply.tokens_out) == (SOLUTION, (), 3, 0)


@pytest.mark.parametrize(
    "value", [None, [], "x", {}, {"choices": []}, {"choices": [3]}, {"choices": [{"message": "x"}]}]
)
def test_what_is_no_completion(value: Any) -> None:
    assert read_reply(value) is None


def test_halves_of_surrogate_pairs_do_not_reach_a_file() -> None:
    reply = read_reply(body('{"reasoning_with_compression": "a \\ud83d b"}'))
    assert reply is not None
    assert reply.text.encode() == b"a ? b"


def test_the_example_in_the_prompt_is_valid() -> None:
    example = PROMPT.split("Example of the form:\n")[1].strip()
    assert validate(Trace("q", example, "36")) == []
    assert implausible(example) == []
    assert len(Trace("q", example, "36").marks) == 3


def test_the_question_is_asked_in_one_user_message() -> None:
    (plain,), (structured,) = messages("How many? ", False), messages("How many? ", True)
    assert plain["content"].endswith("\nProblem: How many?")
    assert "JSON" not in plain["content"]
    assert SCHEMA["json_schema"]["schema"]["required"][0] in structured["content"]


@pytest.mark.skipif(not SHARED.exists(), reason=f"{SHARED} is not on this machine")
def test_real_valid_traces_are_sensible() -> None:
    valid, _ = filter_valid(read_traces(SHARED))
    found = [reasons for trace in valid if (reasons := implausible(trace.reasoning_with_compression))]
    print(f"{len(found)} of {len(valid)} valid GPT-4o-mini traces are not sensible: {found}")
    assert len(found) <= 0.005 * len(valid)


def test_waits_double_up_to_a_limit_and_differ() -> None:
    retry = Retry(first=1.0, longest=10.0)
    for attempt, whole in ((1, 1), (2, 2), (4, 8), (5, 10), (2000, 10)):
        delays = [retry.delay(attempt) for _ in range(200)]
        assert whole / 2 <= min(delays) < 0.6 * whole
        assert 0.9 * whole < max(delays) <= whole
    assert min(retry.delay(1, asked=7.0) for _ in range(100)) >= 7.0


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, 0),
        ({"Retry-After": "3"}, 3),
        ({"retry-after": "0.5"}, 0.5),
        ({"Retry-After": "-1"}, 0),
        ({"Retry-After": "nan"}, 0),
        ({"Retry-After": "soon"}, 0),
        ({"Retry-After": "inf"}, float("inf")),
        ({"Retry-After-Ms": "250", "Retry-After": "1"}, 0.25),
        ({"Retry-After": "Wed, 21 Oct 2015 07:28:30 GMT", "Date": "Wed, 21 Oct 2015 07:28:00 GMT"}, 30),
        ({"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0),
    ],
)
def test_retry_after(headers: dict[str, str], seconds: float) -> None:
    assert retry_after(headers) == seconds


def test_a_date_without_the_servers_own_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.time", lambda: 1_000_000.0)
    assert retry_after({"Retry-After": formatdate(1_000_042.0, usegmt=True)}) == 42


def test_which_statuses_may_pass() -> None:
    assert [status for status in range(400, 600) if is_retried(status)] == [408, 409, 429, *range(500, 600)]


def test_the_key_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-0123456789")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://10.0.0.3:8000/v1/")
    assert endpoint() == Endpoint("http://10.0.0.3:8000/v1", "sk-0123456789")
    assert endpoint("https://api.example.com/v1").base_url == "https://api.example.com/v1"
    with pytest.warns(UserWarning, match="unencrypted"):
        endpoint("http://api.example.com/v1")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-caf\u00e9")
    with pytest.raises(UserError, match="characters that no key has") as caught:
        endpoint()
    assert "caf" not in str(caught.value)


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "[::1]", "192.168.1.7", "gpu-box", "box.local"])
def test_servers_of_this_network_need_no_key(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert endpoint(f"http://{host}:8000/v1").key == ""
    with pytest.raises(UserError, match="OPENAI_API_KEY is not set"):
        endpoint("https://8.8.8.8/v1")


def test_quotes_of_servers_are_short_and_hold_no_key() -> None:
    server = Endpoint("u", "topsecret99")
    assert server.quote("key topsecret99,\n sk-proj-ab***yz or Bearer abc.def") == "key [key], [key] or Bearer [key]"
    assert len(server.quote("x" * 999)) == 200
    assert Endpoint("u", "none").redact("none of them") == "none of them"


def test_prices_are_known_or_given() -> None:
    known = prices_of("gpt-4o-mini")
    assert known is not None
    assert prices_of("gpt-4o-mini", tokens_out=9.0) != known
    assert prices_of("other", 1.0) is None
    assert prices_of("other", 1.0, 2.0) is not None


def test_the_bar_shows_counts_reasons_tokens_and_cost() -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=200)
    with CollectionProgress(console, Tally(prices_of("gpt-4o-mini")), 3, 10) as progress:
        progress(Outcome("a", "valid", tokens_in=2_000_000, tokens_out=1_000_000))
        progress(Outcome("b", "rejected", reasons=("wrong_answer",), requests=2))
        progress(Outcome("c", "failed", reasons=("timeout",), requests=8))
    said = screen.getvalue()
    assert "4/10" in said
    assert "asked 3: 1 valid, 1 rejected, 1 failed (wrong_answer 1, timeout 1)" in said
    assert "11 requests, tokens 2,000,000 in, 1,000,000 out, about $0.9000" in said


def test_without_a_terminal_there_are_ten_lines() -> None:
    log = io.StringIO()
    with CollectionProgress(Console(file=log, force_terminal=False), Tally(), 0, 40) as progress:
        for number in range(40):
            progress(Outcome(str(number), "valid"))
    lines = log.getvalue().splitlines()
    assert [line.split(" valid")[0] for line in lines if line] == [f"{n} of 40" for n in range(4, 41, 4)]
    assert "cost unknown" in lines[0]


def test_a_hub_source_may_name_a_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    def load_dataset(name: str, config: str | None, split: str) -> list[dict[str, str]]:
        asked.append((name, config, split))
        return [{"question": "q", "answer": "#### 2"}]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert [gold.answer for gold in read_gold("hub:openai/gsm8k:main", "test")] == ["2"]
    assert [gold.source for gold in read_gold("hub:me/mine")] == ["hub:me/mine"]
    assert asked == [("openai/gsm8k", "main", "test"), ("me/mine", None, "train")]
