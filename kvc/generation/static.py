"""One decoding step of fixed shapes: as it is, compiled, or as a CUDA graph.

    output = generate(model, ids, compressor=eviction, max_new_tokens=4096, static=StaticStep("compile"))

Shapes: B rows of the batch, V tokens of the vocabulary.
"""

from typing import Any, Literal, get_args

import torch
from transformers import PreTrainedModel

from kvc.cache.hooks import attach
from kvc.cache.memory import KVMemory
from kvc.cache.static import StaticMemory, check_storage
from kvc.core.attention import open_door
from kvc.errors import UserError

Mode = Literal["eager", "compile", "graph"]

WARM_UP = 3
"""Steps on a side stream before one is captured: libraries set themselves up in the first ones."""
SHAPES = 64
"""Models and shapes that one process may compile a step for; torch gives up after eight."""


class StaticStep:
    """Runs a model on one token for each row of a static memory.

    Args:
        mode: `eager` runs it as it is. `compile` compiles it with torch.compile, once for each model and shape. `graph`
            captures the kernels of a step as a CUDA graph and replays it; captured anew for each call of generate.

    Raises:
        UserError: If there is no such mode.
    """

    def __init__(self, mode: Mode = "eager") -> None:
        if mode not in get_args(Mode):
            raise UserError(f"mode: '{mode}' is not one of {', '.join(get_args(Mode))}")
        self.mode = mode
        self._compiled = torch.compile(_forward, fullgraph=True, dynamic=False) if mode == "compile" else None
        self._model: PreTrainedModel | None = None
        self._memory: StaticMemory | None = None
        self._graph: _Graph | None = None
        self._fresh = True

    def check(self, memory: KVMemory, device: torch.device) -> None:
        """Refuse what could not be decoded on.

        Args:
            memory: The memory that would become static.
            device: Of the tokens.

        Raises:
            UserError: If the memory stores its rows in codes, or a graph is wanted elsewhere than on a CUDA device.
        """
        check_storage(memory)
        if self.mode == "graph" and device.type != "cuda":
            raise UserError(f"mode: 'graph' captures CUDA kernels, and the model runs on {device.type}: use 'compile'")

    def begin(self, model: PreTrainedModel, memory: StaticMemory) -> None:
        """The steps to come are on this memory.

        Args:
            model: In eval mode.
            memory: Made from a memory of this model.
        """
        attach(model)
        if self.mode == "compile" and model.config._attn_implementation == "sdpa":
            # The project's own function does not copy keys for every query head.
            open_door(model)
        self._model, self._memory, self._fresh = model, memory, True
        self._graph = _Graph(model, memory) if self.mode == "graph" else None

    def end(self) -> None:
        """Let go of model and memory."""
        self._model, self._memory, self._graph = None, None, None

    @torch.no_grad()
    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        """Feed one token for each row.

        Args:
            tokens: int64 `[B, 1]`.

        Returns:
            Logits of the next token `[B, V]`; a graph overwrites them in the next step.

        Raises:
            ValueError: If the memory is full.
        """
        assert self._model is not None, "begin() comes first"
        assert self._memory is not None
        self._memory.reserve()
        if self._graph is not None:
            return self._graph(tokens)
        if self._compiled is None:
            return _forward(self._model, self._memory, tokens)
        if self._fresh:
            self._fresh = False
            with torch._dynamo.config.patch(recompile_limit=SHAPES):
                return self._compiled(self._model, self._memory, tokens)
        return self._compiled(self._model, self._memory, tokens)


class _Graph:
    """A step as a CUDA graph, by the protocol of torch: warm up on a side stream, capture, replay on fixed inputs.

    The steps of the warm-up are real ones, and a capture runs nothing: so no step happens twice.
    """

    def __init__(self, model: PreTrainedModel, memory: StaticMemory) -> None:
        self._model, self._memory = model, memory
        self._steps = 0
        self._side = torch.cuda.Stream(memory.next_position.device)  # type: ignore[no-untyped-call]
        self._graph = torch.cuda.CUDAGraph()
        self._tokens = torch.empty(0)
        self._logits = torch.empty(0)

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        """See `StaticStep`."""
        self._steps += 1
        if self._steps <= WARM_UP:
            self._side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._side):
                logits = _forward(self._model, self._memory, tokens)
            torch.cuda.current_stream().wait_stream(self._side)
            logits.record_stream(torch.cuda.current_stream())
            return logits
        if self._steps == WARM_UP + 1:
            self._tokens = tokens.clone()
            with torch.cuda.graph(self._graph):
                self._logits = _forward(self._model, self._memory, self._tokens)
        self._tokens.copy_(tokens)
        self._graph.replay()
        return self._logits


def _forward(model: Any, memory: StaticMemory, tokens: torch.Tensor) -> torch.Tensor:
    """Logits `[B, V]` after the tokens `[B, 1]`."""
    logits: torch.Tensor = model(input_ids=tokens, past_key_values=memory, use_cache=True).logits[:, -1]
    return logits
