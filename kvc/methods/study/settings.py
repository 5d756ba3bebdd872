"""The settings of a study."""

import inspect
from dataclasses import asdict, dataclass
from typing import Any

from kvc.cache.rotation import Mode as RotationMode
from kvc.core.seeds import DEFAULT_SEED
from kvc.errors import UserError
from kvc.eviction.eviction import Eviction
from kvc.eviction.policy import Policy
from kvc.eviction.registry import POLICIES, make_policy
from kvc.methods.study.modes import MODES, POINTS, Complexity, ModeName


@dataclass(frozen=True)
class StudySettings:
    """How documents are studied.

    Attributes:
        budget: Rows per layer and KV head that are left after each document; null never compresses.
        window: Newest rows that always stay, and whose queries score the others.
        prefix: Tokens at the start that are never evicted and never moved.
        mode: What the model writes after each document.
        summary_complexity: How long.
        num_epochs: How often the list of documents is read.
        rotation: `keep` leaves rows at their positions, `compact` moves them together behind the prefix, `place:T`
            moves them together so that they end at position T.
        max_document_tokens: Longer documents are left out.
        max_new_tokens: Longest summary.
        temperature: Of the summaries; 0 is greedy.
        top_p: Of the summaries, at a temperature above 0.
        chunk: Tokens of a document that one forward reads.
        every_document: Keep the memory after each document too.
        seed: Of the summaries.
    """

    budget: int | None = 1312
    window: int = 128
    prefix: int = 160
    mode: ModeName = "takeaways"
    summary_complexity: Complexity = "complex"
    num_epochs: int = 1
    rotation: str = "keep"
    max_document_tokens: int = 12_000
    max_new_tokens: int = 2048
    temperature: float = 0.1
    top_p: float = 0.95
    chunk: int = 2048
    every_document: bool = False
    seed: int = DEFAULT_SEED

    def __post_init__(self) -> None:
        """Check what can be checked without a model.

        Raises:
            UserError: If a value is out of range, or the budget is not above window and prefix.
        """
        if self.mode not in MODES:
            raise UserError(f"mode: '{self.mode}' is not one of {', '.join(MODES)}")
        if self.summary_complexity not in POINTS:
            raise UserError(f"summary_complexity: '{self.summary_complexity}' is not one of {', '.join(POINTS)}")
        for name in ("num_epochs", "max_document_tokens", "max_new_tokens", "chunk", "window"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}: must be at least 1, got {getattr(self, name)}")
        if self.prefix < 0:
            raise UserError(f"prefix: must not be negative, got {self.prefix}")
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise UserError("temperature must not be negative, and top_p must be above 0 and at most 1")
        if self.budget is not None and self.budget <= self.window + self.prefix:
            raise UserError(
                f"budget: must be above window + prefix = {self.window} + {self.prefix} = {self.window + self.prefix}, "
                f"got {self.budget}"
            )
        mode, end = self.rotates
        if mode == "place" and end is not None and end < max(self.budget or 0, self.prefix + 1):
            raise UserError(
                f"rotation: place:{end} has no room for {max(self.budget or 0, self.prefix + 1)} rows; "
                "T is the position behind the last row"
            )

    @property
    def rotates(self) -> tuple[RotationMode, int | None]:
        """Mode of the rotation, and where the rows end for `place`.

        Raises:
            UserError: If the text is none of `keep`, `compact` and `place:T`.
        """
        name, _, end = self.rotation.partition(":")
        if name == "place" and end.isdecimal():
            return "place", int(end)
        if self.rotation in ("keep", "compact"):
            return self.rotation, None  # type: ignore[return-value]
        raise UserError(f"rotation: '{self.rotation}' is not one of keep, compact, place:T (place:2048)")

    def eviction(self, policy: Policy) -> Eviction | None:
        """What compresses, if anything does.

        Raises:
            UserError: If the budget leaves the policy nothing to choose.
        """
        return None if self.budget is None else Eviction(policy, self.budget, prefix=self.prefix)

    def as_dict(self, policy: Policy) -> dict[str, Any]:
        """All of it, with the policy by name and settings, as JSON."""
        return {**asdict(self), "policy": policy.name, "policy_settings": dict(sorted(vars(policy).items()))}


def policy_of(name: str, window: int) -> Policy:
    """A policy by name, with the window if it has one.

    Raises:
        UserError: If there is no such policy.
    """
    kind = POLICIES.get(name)
    takes = kind is not None and "window" in inspect.signature(kind).parameters
    return make_policy(name, **({"window": window} if takes else {}))
