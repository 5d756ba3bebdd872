"""Counts of a collection: what was asked, what became of it, which tokens it took, what that costs."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from kvc.data.annotate.chat.outcome import Outcome

MILLION = 1_000_000
PRICES = {"gpt-4o-mini": (0.15, 0.60)}
"""US dollars per million tokens of prompt and of reply, as listed by OpenAI; others are given on the command line."""


@dataclass(frozen=True)
class Prices:
    """US dollars per million tokens.

    Attributes:
        tokens_in: Of the prompt.
        tokens_out: Of the reply.
    """

    tokens_in: float
    tokens_out: float


def prices_of(model: str, tokens_in: float | None = None, tokens_out: float | None = None) -> Prices | None:
    """Prices as given; where none is given, the listed ones of the model; None if one of the two is unknown."""
    listed = PRICES.get(model, (None, None))
    both = (listed[0] if tokens_in is None else tokens_in, listed[1] if tokens_out is None else tokens_out)
    return None if both[0] is None or both[1] is None else Prices(both[0], both[1])


@dataclass
class Tally:
    """Running counts over all sessions of one journal.

    Attributes:
        asked: Replies judged and questions failed.
        valid: Valid traces.
        rejected: Replies that are no valid traces.
        failed: Questions without a reply.
        reasons: How often each reason spoke against one; a reply may have several.
        requests: HTTP requests, retries included.
        tokens_in: Tokens of the prompts.
        tokens_out: Tokens of the replies.
        prices: Prices of tokens, if known.
    """

    prices: Prices | None = None
    asked: int = 0
    valid: int = 0
    rejected: int = 0
    failed: int = 0
    requests: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    reasons: Counter[str] = field(default_factory=Counter)

    def add(self, outcome: Outcome) -> None:
        """Count one outcome."""
        self.asked += 1
        self.valid += outcome.status == "valid"
        self.rejected += outcome.status == "rejected"
        self.failed += outcome.status == "failed"
        self.requests += outcome.requests
        self.tokens_in += outcome.tokens_in
        self.tokens_out += outcome.tokens_out
        self.reasons.update(outcome.reasons)

    @property
    def cost(self) -> float | None:
        """Estimate in US dollars; None without prices."""
        if self.prices is None:
            return None
        return (self.tokens_in * self.prices.tokens_in + self.tokens_out * self.prices.tokens_out) / MILLION

    def reasons_text(self) -> str:
        """Reasons and how often, most frequent first: `wrong_answer 3, no_marker 1`."""
        return ", ".join(f"{reason} {count}" for reason, count in self.reasons.most_common())

    def text(self) -> str:
        """One line for people."""
        against = f" ({self.reasons_text()})" if self.reasons else ""
        cost = "cost unknown" if self.cost is None else f"about ${self.cost:.4f}"
        return (
            f"asked {self.asked}: {self.valid} valid, {self.rejected} rejected, {self.failed} failed{against}; "
            f"{self.requests} requests, tokens {self.tokens_in:,} in, {self.tokens_out:,} out, {cost}"
        )

    def summary(self) -> dict[str, Any]:
        """The counts as a JSON-able object."""
        return {
            "asked": self.asked,
            "valid": self.valid,
            "rejected": self.rejected,
            "failed": self.failed,
            "reasons": dict(self.reasons.most_common()),
            "requests": self.requests,
            "tokens_in": self.tokens_in,
            "tokens_out": self.tokens_out,
            "cost_usd": None if self.cost is None else round(self.cost, 6),
        }
