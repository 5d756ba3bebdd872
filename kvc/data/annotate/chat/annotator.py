"""The annotator that asks a model: alone for one problem, or as the worker of a whole collection."""

import asyncio

from kvc.data.annotate.base import Gold
from kvc.data.annotate.chat.client import ChatClient, RequestFailedError, Sampling
from kvc.data.annotate.chat.endpoint import Endpoint
from kvc.data.annotate.chat.outcome import NAME, Outcome, trace_of, verdict
from kvc.data.annotate.chat.pool import Item, key_of
from kvc.data.annotate.chat.retry import Retry
from kvc.data.traces import Trace
from kvc.errors import UserError


async def ask(client: ChatClient, item: Item) -> Outcome:
    """Ask for one solution and judge it.

    Raises:
        UserError: The server answers no question at all.
    """
    structured = client.structured
    try:
        reply, requests = await client.complete(item.gold.question)
    except RequestFailedError as error:
        return Outcome(item.key, "failed", "", (error.reason,), error.requests, message=error.message)
    status, reasons = verdict(trace_of(item, reply.text, client.sampling.model), reply.reasons)
    structured = structured and client.structured
    return Outcome(item.key, status, reply.text, reasons, requests, reply.tokens_in, reply.tokens_out, structured)


class OpenAIAnnotator:
    """Lets a model solve a problem and mark its own solution; the gold solution only serves as the check.

    Args:
        endpoint: The server, from `kvc.data.annotate.chat.endpoint.endpoint`.
        sampling: Model and its settings.
        retry: How long and how often to try.
        timeout: Seconds for one request.
    """

    name = NAME

    def __init__(
        self,
        endpoint: Endpoint,
        sampling: Sampling | None = None,
        retry: Retry | None = None,
        timeout: float = 120.0,
    ) -> None:
        self.endpoint, self.timeout = endpoint, timeout
        self.sampling, self.retry = sampling or Sampling(), retry or Retry()

    def client(self, structured: bool = True) -> ChatClient:
        """A new connection, to be used in one event loop."""
        return ChatClient(self.endpoint, self.sampling, self.retry, self.timeout, structured)

    def annotate(self, question: str, answer: str, reasoning: str) -> Trace:
        """A trace for one problem, not yet validated.

        Args:
            question: The problem.
            answer: The gold answer.
            reasoning: The gold solution, which the model does not see.

        Raises:
            UserError: The server does not answer.
        """

        async def alone() -> Outcome:
            async with self.client() as client:
                return await ask(client, item)

        item = Item(key_of(question), Gold(question, answer, reasoning, ""))
        outcome = asyncio.run(alone())
        if outcome.status == "failed":
            raise UserError(outcome.message)
        trace = trace_of(item, outcome.text, self.sampling.model)
        extra = {key: value for key, value in trace.extra.items() if key not in ("source", "valid")}
        return Trace(question, outcome.text, answer, reasoning, extra)
