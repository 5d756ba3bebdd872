"""Compressed context memory: the context is kept as the keys and values of a few memory tokens."""

from kvc.methods.ccm.module import CompressedContextMemory

__all__ = ["CompressedContextMemory"]
