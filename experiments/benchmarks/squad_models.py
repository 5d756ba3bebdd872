"""Models, compressors and texts that the benchmark of context compressors runs on."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch

from experiments.benchmarks.ccm import SHAPES as LLAMAS
from kvc.core.backbone import Backbone
from kvc.core.seeds import DEFAULT_SEED
from kvc.methods.squad import Anchors, Convolution, CrossAttention, FixedRatio, Latent, MeanPool, WeightedPooling

_LARGE: dict[str, Any] = {"tie_word_embeddings": False, "initializer_range": 0.02}
SHAPES = {"tiny": {}, **{name: {**_LARGE, **LLAMAS[name]} for name in ("llama1b", "llama8b")}}
"""Fields of a Llama with random weights that are not those of the tiny model."""
MADE_FOR_SLOTS: dict[str, Any] = {
    "cross_attention": CrossAttention,
    "convolution": Convolution,
    "pooling": WeightedPooling,
    "latent": Latent,
}
SLOT_MAKERS = ("mean_pool", *MADE_FOR_SLOTS)
KEEPERS = ("anchors", "gist")
"""Compressors whose slots are keys and values."""
WAYS = (*SLOT_MAKERS, *(f"{name}_embeddings" for name in SLOT_MAKERS), *KEEPERS)
TRAINED = (*SLOT_MAKERS, "anchors", "full_text")


class Sizes(NamedTuple):
    """What is read.

    Attributes:
        shape: Key of `SHAPES`.
        batch: Passages.
        context: Tokens of each passage.
        head: Tokens before it.
        tail: Tokens of a question.
        answer: Tokens of an answer.
        ratio: Tokens of a slot.
        max_length: Tokens that are compressed at once.
    """

    shape: str
    batch: int
    context: int
    head: int
    tail: int
    answer: int
    ratio: float
    max_length: int


def maker(name: str, sizes: Sizes) -> Callable[[int, float], Any]:
    """A compressor by name, to be called with width and root mean square of the embeddings."""
    if name == "anchors":
        return Anchors
    if name == "mean_pool":
        return MeanPool
    # Each piece of a longer passage has slots of its own, at most so many.
    most = int(FixedRatio(sizes.ratio).counts(torch.tensor([min(sizes.context, sizes.max_length)])))
    settings: dict[str, Any] = {"slots": most}
    if name in ("convolution", "pooling"):
        settings["max_length"] = sizes.max_length
    return partial(MADE_FOR_SLOTS[name], **settings)


def backbone(sizes: Sizes, device: str, **settings: Any) -> Backbone:
    """The base model: random weights; bf16 on a GPU."""
    dtype: Any = "bfloat16" if device == "cuda" else "float32"
    return Backbone(from_config=True, overrides=SHAPES[sizes.shape], dtype=dtype, **settings)


def draw(sizes: Sizes, vocabulary: int, device: str) -> dict[str, Any]:
    """A batch of random texts, as `ContextCompressor` takes it."""
    generator = torch.Generator().manual_seed(DEFAULT_SEED)
    lengths = {"head": sizes.head, "context": sizes.context, "tail": sizes.tail, "answer": sizes.answer}
    batch: dict[str, Any] = {}
    for part, count in lengths.items():
        ids = torch.randint(vocabulary, (sizes.batch, count), generator=generator).to(device)
        batch |= {f"{part}_ids": ids, f"{part}_mask": torch.ones_like(ids)}
    return batch
