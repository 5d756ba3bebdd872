"""Questions about passages, answered by a span of the passage (Rajpurkar et al. 2016, 2018)."""

from kvc.data.squad.module import Squad

__all__ = ["Squad"]
