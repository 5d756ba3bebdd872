"""`annotate --annotator openai`: its options, and what they make."""

import argparse
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from kvc.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from kvc.data.traces import Trace

OPENAI_OPTIONS = {
    "base_url": None,
    "model": "gpt-4o-mini",
    "temperature": 0.3,
    "max_tokens": 1024,
    "concurrency": 8,
    "timeout": 120.0,
    "max_attempts": 8,
    "backoff": 1.0,
    "ask_again": 1,
    "price_input": None,
    "price_output": None,
}
"""Defaults of the options that no other annotator reads."""


def positive(text: str) -> int:
    """A whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _whole(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must not be negative, got {value}")
    return value


def _amount(text: str) -> float:
    value = float(text)
    if not (math.isfinite(value) and value >= 0):
        raise argparse.ArgumentTypeError(f"must be a number that is not negative, got {text}")
    return value


def _seconds(text: str) -> float:
    value = _amount(text)
    if value == 0:
        raise argparse.ArgumentTypeError("must be more than 0 seconds")
    return value


def add_options(result: argparse.ArgumentParser) -> None:
    """Options of `--annotator openai`; None stands for the default, so that one without effect can be told."""
    group = result.add_argument_group("options of --annotator openai")

    def add(name: str, kind: Callable[[str], object], metavar: str, text: str) -> None:
        default = OPENAI_OPTIONS[name]
        shown = "" if default is None else f" (default: {default})"
        group.add_argument(f"--{name}", type=kind, metavar=metavar, help=f"{text}{shown}")

    add("base_url", str, "URL", "server (default: $OPENAI_BASE_URL, else OpenAI); one on this network may need no key")
    add("model", str, "NAME", "model at the server")
    add("temperature", _amount, "T", "randomness of the replies")
    add("max_tokens", positive, "N", "longest reply in tokens")
    add("concurrency", positive, "N", "most requests in flight")
    add("timeout", _seconds, "SECONDS", "longest time for one request")
    add("max_attempts", positive, "N", "requests for one question before it counts as failed")
    add("backoff", _amount, "SECONDS", "wait before the second request; it doubles, with jitter, up to a minute")
    add("ask_again", _whole, "K", "times to ask again after invalid replies, once all others were asked")
    add("price_input", _amount, "USD", "per million tokens of prompt, for the estimate of the cost")
    add("price_output", _amount, "USD", "per million tokens of reply")


def collect(arguments: argparse.Namespace, console: "Console") -> "list[Trace]":
    """Let a model behind a server annotate; it has its own journal, order and progress."""
    from kvc.data.annotate.chat.annotator import OpenAIAnnotator
    from kvc.data.annotate.chat.client import Sampling
    from kvc.data.annotate.chat.endpoint import endpoint
    from kvc.data.annotate.chat.retry import Retry
    from kvc.data.annotate.chat.run import Task, run
    from kvc.data.annotate.chat.tally import prices_of

    def option(name: str) -> Any:
        given = getattr(arguments, name)
        return OPENAI_OPTIONS[name] if given is None else given

    if arguments.input.startswith("synthetic:"):
        raise UserError("--annotator openai needs a file or hub:owner/name; write one with --annotator synthetic")
    sampling = Sampling(option("model"), option("temperature"), option("max_tokens"))
    retry = Retry(option("max_attempts"), option("backoff"))
    annotator = OpenAIAnnotator(endpoint(option("base_url")), sampling, retry, option("timeout"))
    task = Task(
        source=arguments.input,
        output=arguments.output,
        number=arguments.num_samples,
        seed=arguments.seed,
        split="validation" if arguments.split == "val" else arguments.split,
        concurrency=option("concurrency"),
        again=option("ask_again"),
        prices=prices_of(sampling.model, option("price_input"), option("price_output")),
        overwrite=arguments.overwrite,
    )
    return run(task, annotator, console)
