"""One question to the server: retries, the pause that a server asks for, and the fallbacks it needs."""

import asyncio
import json
from dataclasses import dataclass, replace
from typing import Any, Self

from kvc.data.annotate.chat.endpoint import Endpoint
from kvc.data.annotate.chat.problem import NEWER_LIMIT, Problem, problem_of, server_message
from kvc.data.annotate.chat.prompt import SCHEMA, messages
from kvc.data.annotate.chat.reply import Reply, read_reply
from kvc.data.annotate.chat.retry import Retry
from kvc.errors import UserError

MODEL = "gpt-4o-mini"
CONNECT_SECONDS = 10.0


@dataclass(frozen=True)
class Sampling:
    """What the model is and how it writes; another value means other data.

    Attributes:
        model: Name of the model at the server.
        temperature: Randomness of the reply.
        max_tokens: Longest reply in tokens.
    """

    model: str = MODEL
    temperature: float = 0.3
    max_tokens: int = 1024


class RequestFailedError(Exception):
    """A question got no answer.

    Args:
        reason: Code for counting.
        message: What the server did, last.
        requests: Requests made.
    """

    def __init__(self, reason: str, message: str, requests: int) -> None:
        super().__init__(message)
        self.reason, self.message, self.requests = reason, message, requests


class ChatClient:
    """Sends questions to one server; used by many tasks of one event loop.

    Args:
        endpoint: The server.
        sampling: Model and its settings.
        retry: How long and how often to try.
        timeout: Seconds for one request, from connecting to the last byte.
        structured: Whether to ask for a JSON object; a server that refuses that is asked for plain text from then on.
    """

    def __init__(
        self, endpoint: Endpoint, sampling: Sampling, retry: Retry, timeout: float = 120.0, structured: bool = True
    ) -> None:
        from openai import AsyncOpenAI, Timeout

        self.endpoint, self.sampling, self.retry, self.timeout = endpoint, sampling, retry, timeout
        self.structured = structured
        self._limit = "max_tokens"
        self._answered = False
        self._met = False
        self._first = asyncio.Lock()
        self._open_at = 0.0
        self._stopped: UserError | None = None
        self._client = AsyncOpenAI(
            api_key=endpoint.key or "none",
            base_url=endpoint.base_url,
            timeout=Timeout(timeout, connect=min(CONNECT_SECONDS, timeout / 2)),
            max_retries=0,  # the library gives up where a server asks for more than two minutes
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._client.close()

    async def complete(self, question: str) -> tuple[Reply, int]:
        """The model's reply to a question.

        Returns:
            The reply, and the number of requests it took.

        Raises:
            RequestFailedError: The server refuses this question, or has not answered it after all attempts.
            UserError: No question can be answered: wrong key, wrong model, no such server.
        """
        requests = attempt = 0
        while True:
            requests += 1
            result = await self._in_turn(question)
            if isinstance(result, Reply):
                return result, requests
            if result.action in {"plain", "limit"}:
                continue
            attempt += 1
            if result.action != "again" or attempt >= self.retry.attempts:
                raise RequestFailedError(result.reason, result.message, requests)
            await asyncio.sleep(self.retry.delay(attempt, result.wait))

    async def _in_turn(self, question: str) -> Reply | Problem:
        """One request, when it may be made.

        The very first goes alone, so that a bad key costs one request and not many. Later ones wait until nobody has
        been asked to wait any more.
        """
        if not self._met:
            async with self._first:
                if not self._met:
                    result = await self._request(question)
                    self._met = True
                    return result
        while (left := self._open_at - _now()) > 0:
            await asyncio.sleep(left)
        return await self._request(question)

    async def _request(self, question: str) -> Reply | Problem:
        if self._stopped is not None:
            raise self._stopped
        structured, limit = self.structured, self._limit
        try:
            async with asyncio.timeout(self.timeout):
                body = await self._post(question, structured, limit)
        except Exception as error:
            problem = problem_of(error, self.endpoint)
            if problem is None:
                raise
        else:
            reply = read_reply(body)
            if reply is not None:
                self._answered = True
                return reply
            said = self.endpoint.quote(server_message(body)[0])
            message = f"{self.endpoint.base_url} sends no chat completion" + (f": {said}" if said else "")
            problem = Problem("again", "bad_response", message)
        self._stop_if_hopeless(problem)
        return self._adapt(problem, structured, limit)

    async def _post(self, question: str, structured: bool, limit: str) -> Any:
        """The decoded body; None if it is no JSON."""
        settings: dict[str, Any] = {limit: self.sampling.max_tokens}
        if structured:
            settings["response_format"] = SCHEMA
        response = await self._client.chat.completions.with_raw_response.create(
            model=self.sampling.model,
            messages=messages(question, structured),
            temperature=self.sampling.temperature,
            **settings,
        )
        try:
            # No server has a reason to repeat the key, but what it sends ends up in files.
            return json.loads(self.endpoint.redact(response.http_response.text))
        except (ValueError, RecursionError):
            return None

    def _adapt(self, problem: Problem, structured: bool, limit: str) -> Problem:
        """Ask differently from now on, if that may help and was not tried with this request; else it failed."""
        self._open_at = max(self._open_at, _now() + problem.wait)
        if problem.action == "plain" and structured:
            self.structured = False
        elif problem.action == "limit" and limit != NEWER_LIMIT:
            self._limit = NEWER_LIMIT
        elif problem.action in {"plain", "limit"}:
            return replace(problem, action="fail")
        return problem

    def _stop_if_hopeless(self, problem: Problem) -> None:
        message = ""
        if problem.action == "stop" or (problem.unreachable and not self._answered):
            message = problem.message
        elif problem.wait > self.retry.patience:
            message = f"{problem.message} (it asks to wait {problem.wait:.0f} s; try again later)"
        if message:
            self._stopped = UserError(message)
            raise self._stopped


def _now() -> float:
    return asyncio.get_running_loop().time()
