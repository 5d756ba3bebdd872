"""Conditions of a grid file between settings of a cell: `budget > window + prefix`."""

import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

RELATIONS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    "!=": operator.ne,
    ">": operator.gt,
    "<": operator.lt,
}
_SPLIT = re.compile(r"(>=|<=|==|!=|>|<)")
_NUMBER = re.compile(r"\d+(?:\.\d+)?")
_KEY = re.compile(r"[A-Za-z_][\w.]*")


@dataclass(frozen=True)
class Condition:
    """A relation between two sums of settings and numbers.

    Attributes:
        text: As it stands in the grid file.
        left: Terms of the left sum.
        relation: One of `RELATIONS`.
        right: Terms of the right sum.
    """

    text: str
    left: tuple[str, ...]
    relation: str
    right: tuple[str, ...]

    def holds(self, settings: Mapping[str, Any]) -> bool:
        """Whether settings meet it.

        Raises:
            ValueError: If one of its settings is missing or no number.
        """
        left, right = (sum(self._value(term, settings) for term in terms) for terms in (self.left, self.right))
        return RELATIONS[self.relation](left, right)

    def _value(self, term: str, settings: Mapping[str, Any]) -> float:
        if _NUMBER.fullmatch(term):
            return float(term)
        value = settings.get(term)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"'{self.text}': {term} is {'not set' if value is None else f'no number but {value!r}'}")
        return value


def parse_condition(text: str) -> Condition:
    """Read `TERM + TERM ... RELATION TERM + TERM ...`; a term is a key or a number.

    Raises:
        ValueError: If it has another form.
    """
    parts = _SPLIT.split(text)
    sums = [tuple(term.strip() for term in part.split("+")) for part in parts[::2]]
    if len(sums) != 2 or not all(_NUMBER.fullmatch(term) or _KEY.fullmatch(term) for terms in sums for term in terms):
        raise ValueError(f"'{text}' is no condition; write one like budget > window + prefix")
    return Condition(text, sums[0], parts[1], sums[1])
