"""Compressed contexts for question answering: a text becomes a few vectors that a language model reads as its input."""

from kvc.methods.squad.anchor import Anchors
from kvc.methods.squad.brief import CompressionConfig
from kvc.methods.squad.budget import Budget, FixedRatio, FixedSlots
from kvc.methods.squad.convolution import Convolution
from kvc.methods.squad.cross_attention import CrossAttention
from kvc.methods.squad.evaluation import TextBaselines
from kvc.methods.squad.interface import SlotCompressor, Slots
from kvc.methods.squad.latent import Latent
from kvc.methods.squad.lessons import Lessons
from kvc.methods.squad.mean_pool import MeanPool
from kvc.methods.squad.module import ContextCompressor
from kvc.methods.squad.pooling import WeightedPooling
from kvc.methods.squad.source import Source

__all__ = [
    "Anchors",
    "Budget",
    "CompressionConfig",
    "ContextCompressor",
    "Convolution",
    "CrossAttention",
    "FixedRatio",
    "FixedSlots",
    "Latent",
    "Lessons",
    "MeanPool",
    "SlotCompressor",
    "Slots",
    "Source",
    "TextBaselines",
    "WeightedPooling",
]
