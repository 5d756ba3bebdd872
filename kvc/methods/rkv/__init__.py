"""KV-cache eviction while decoding: R-KV and other policies, measured by what they leave of a model's accuracy."""

from kvc.methods.rkv.module import EvictionReport

__all__ = ["EvictionReport"]
