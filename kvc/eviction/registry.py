"""Policies by name."""

from typing import Any

from kvc.errors import UserError
from kvc.eviction.h2o import H2O
from kvc.eviction.keydiff import KeyDiff
from kvc.eviction.knorm import Knorm
from kvc.eviction.none import FullKV
from kvc.eviction.policy import Policy
from kvc.eviction.random import Random
from kvc.eviction.rkv import RKV
from kvc.eviction.snapkv import SnapKV, SnapKVPrefill
from kvc.eviction.streaming_llm import StreamingLLM
from kvc.eviction.tova import TOVA

POLICIES: dict[str, type[Policy]] = {
    "rkv": RKV,
    "snapkv": SnapKV,
    "snapkv_prefill": SnapKVPrefill,
    "h2o": H2O,
    "streaming_llm": StreamingLLM,
    "tova": TOVA,
    "knorm": Knorm,
    "keydiff": KeyDiff,
    "random": Random,
    "none": FullKV,
}


def make_policy(name: str, **settings: Any) -> Policy:
    """Build a policy.

    Args:
        name: One of `POLICIES`.
        settings: Constructor arguments.

    Raises:
        UserError: If there is no such policy, or it has no such setting.
    """
    if name not in POLICIES:
        raise UserError(f"policy: there is none named '{name}'; known are {', '.join(POLICIES)}")
    kind = POLICIES[name]
    try:
        return kind(**settings)
    except TypeError as error:
        known = ", ".join(kind.__init__.__annotations__.keys() - {"return"}) or "none"
        raise UserError(f"policy: {name} does not take these settings ({error}); it knows: {known}") from error
