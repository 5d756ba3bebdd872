"""Gist tokens: a text is kept as the keys and values of a few learned tokens behind it."""

from kvc.methods.gist.counts import FixedGists, GistCount, GistRatio
from kvc.methods.gist.module import GistTokens

__all__ = ["FixedGists", "GistCount", "GistRatio", "GistTokens"]
