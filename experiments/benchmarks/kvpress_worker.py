"""Decoding with kvpress, measured in an environment of its own; the measuring itself is shared with `decode`.

    PYTHON experiments/benchmarks/kvpress_worker.py SETTINGS.json            # all cells, one JSON object
    PYTHON experiments/benchmarks/kvpress_worker.py SETTINGS.json --serve    # one run a line, as `decode` asks

kvpress needs an older transformers than kvc, so PYTHON is that of an environment made for it
(`python -m venv ENV && ENV/bin/pip install kvpress torch==2.13.0`), and this file imports nothing else of the project.

Settings: `folder` of saved weights, or `config` of a Llama and a `seed`; `device`, `dtype`, `threads`; alone also
`presses`, `rounds` and `cells` (see `Cell`). Side `none` is `model.generate` with full KV in this environment.

What a run is. The prompt is read once per cell; each run gets a copy of its keys and values and its last token, and
decodes greedily, without an end token. The first `lead` forwards are not timed: the first compression, from the whole
prompt to the target, falls there, so what is timed is the steady state, and the same number of compressions for all.

What is not compared. Padding is silently ignored by kvpress, so all rows of a batch have the same length. AdaKV runs,
but masks rows instead of freeing them; ObservedAttention needs eager attention; ChunkKV is refused as a base. For
presses that read several queries kvpress rotates all of them to the newest position: what it keeps differs, what it
costs does not.
"""

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import torch
import transformers
from transformers import AutoModelForCausalLM, DynamicCache, GenerationConfig, LlamaConfig, LlamaForCausalLM

UNITS = ("wall", "processor")
PREFILL_TOKENS = 16384
"""Tokens of a prefill forward: whole rows, one at least."""
WINDOW, KERNEL, SINKS = 8, 7, 4
"""Settings that kvc's policies have by default, given to the presses too."""


@dataclass(frozen=True)
class Cell:
    """One point of the grid.

    Attributes:
        batch: Rows.
        length: Tokens of the prompt.
        lead: Forwards before the clock starts; the first of them gets the last token of the prompt.
        new: Timed forwards.
        budget: Rows per layer and KV head after a compression.
        interval: Decoded tokens between two compressions.
    """

    batch: int
    length: int
    lead: int
    new: int
    budget: int = 256
    interval: int = 64


class Prefix:
    """A prompt of random tokens, and the keys and values of all but its last one, in host memory.

    Args:
        model: The model that reads it.
        cell: Its size.
    """

    def __init__(self, model: LlamaForCausalLM, cell: Cell) -> None:
        draw = torch.Generator().manual_seed(cell.batch * 100_003 + cell.length)
        size = (cell.batch, cell.length)
        self.ids = torch.randint(3, model.config.vocab_size, size, generator=draw).to(model.device)
        config, step = model.config, max(1, PREFILL_TOKENS // cell.length)
        shape = (cell.batch, config.num_key_value_heads, cell.length - 1, config.head_dim)
        # Filled part by part: two copies of a long batch may not fit.
        self.rows = [
            (torch.empty(shape, dtype=model.dtype), torch.empty(shape, dtype=model.dtype))
            for _ in range(config.num_hidden_layers)
        ]
        for start in range(0, cell.batch, step):
            cache = DynamicCache(config=config)
            with torch.no_grad():
                model(self.ids[start : start + step, :-1], past_key_values=cache, logits_to_keep=1)
            for (keys, values), layer in zip(self.rows, cache.layers):
                keys[start : start + step] = layer.keys.cpu()
                values[start : start + step] = layer.values.cpu()


class Plain:
    """`model.generate` with a DynamicCache, without or with a press.

    Args:
        model: The model.
        press: Gives the context in which to generate, and what to count beside the cache.
    """

    def __init__(self, model: LlamaForCausalLM, press: Callable[[Cell], Any] | None = None) -> None:
        self.model, self._press = model, press
        model.generation_config = GenerationConfig(do_sample=False, pad_token_id=0)
        self._running: Any = None

    def cache(self, prefix: Prefix) -> Any:
        """A cache of its own that holds the prefix."""
        cache = DynamicCache(config=self.model.config)
        for layer, (keys, values) in enumerate(prefix.rows):
            cache.update(keys.to(self.model.device), values.to(self.model.device), layer)
        return cache

    def around(self, cell: Cell) -> AbstractContextManager[Any]:
        """What must be entered before decoding."""
        if self._press is None:
            return nullcontext()
        self._running = self._press(cell)
        return self._running(self.model)

    def decode(self, prefix: Prefix, cache: Any, cell: Cell) -> list[list[int]]:
        """New tokens of each row."""
        ids = prefix.ids
        output = self.model.generate(
            ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=cell.lead + cell.new
        )
        return output[:, ids.shape[1] :].tolist()

    def aside(self, arguments: dict[str, Any]) -> list[torch.Tensor]:
        """Tensors held beside the cache, for scoring.

        Args:
            arguments: Of an attention module, in the running forward.
        """
        buffers = getattr(self._running, "hidden_states_buffer", {})
        return [tensor for layer in buffers.values() for tensor in layer]


class Watch:
    """Seconds from the end of forward number `lead` to the end of the block, nothing else added to the loop.

    Args:
        model: Whose forwards are counted.
        lead: Forwards before the clock starts.
    """

    def __init__(self, model: LlamaForCausalLM, lead: int) -> None:
        self._model, self._left, self._cuda = model, lead, model.device.type == "cuda"
        self.seconds: dict[str, float] = {}
        self.device_bytes: dict[str, int] = {}
        self._start: tuple[float, float] | None = None

    def __enter__(self) -> Self:
        """Begin to count."""
        self._handle = self._model.register_forward_hook(self._count)
        self._now()
        return self

    def _count(self, *_: Any) -> None:
        self._left -= 1
        if self._left:
            return
        # A module without hooks takes the short way through __call__, so the timed forwards must not carry this one.
        self._handle.remove()
        if self._cuda:
            torch.cuda.synchronize()
            self.device_bytes["peak"] = torch.cuda.max_memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        self._start = self._now()

    def _now(self) -> tuple[float, float]:
        if self._cuda:
            torch.cuda.synchronize()
        return time.perf_counter(), time.process_time()

    def __exit__(self, kind: Any, *_: Any) -> None:
        """Stop the clock."""
        self._handle.remove()
        if kind is not None:
            return
        if self._start is None:
            raise RuntimeError(f"the loop ended {self._left} forwards before the clock was to start")
        self.seconds = {unit: end - start for unit, start, end in zip(UNITS, self._start, self._now())}
        if self._cuda:
            timed = torch.cuda.max_memory_allocated()
            self.device_bytes = {"peak": max(self.device_bytes["peak"], timed), "peak_timed": timed}


class Ledger:
    """What the cache holds when attention reads it: in every layer of every forward, before anything is dropped.

    Args:
        side: Whose model is watched.
        lead: Forwards that do not count as timed.
    """

    def __init__(self, side: Plain, lead: int) -> None:
        self._side, self._lead, self._handles = side, lead, []
        self._cache: Any = None
        self._rows: list[list[int]] = []
        self._bytes: list[int] = []
        self._aside: list[int] = []

    def __enter__(self) -> Self:
        """Install the hooks; a press must come later, to be seen before it acts."""
        layers = self._side.model.model.layers
        self._handles = [m.self_attn.register_forward_hook(self._note, with_kwargs=True) for m in layers]
        return self

    def _note(self, module: Any, _: Any, kwargs: dict[str, Any], output: Any) -> None:
        self._cache = kwargs["past_key_values"]
        if module.layer_idx == 0:
            self._rows.append([])
            self._bytes.append(0)
            self._aside.append(0)
        self._rows[-1].append(self._cache.layers[module.layer_idx].get_seq_length())
        self._bytes[-1] = max(self._bytes[-1], cache_bytes(self._cache))
        self._aside[-1] = max(self._aside[-1], storage_bytes(self._side.aside(kwargs)))

    def __exit__(self, *_: Any) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()

    def summary(self) -> dict[str, Any]:
        """Bytes of the whole batch, rows per layer, compressions."""
        timed = self._rows[self._lead :]
        drops = [now[0] <= before[0] for before, now in zip(self._rows, self._rows[1:])]
        return {
            "kv_bytes": {
                "peak": max(self._bytes),
                "peak_timed": max(self._bytes[self._lead :]),
                "end": cache_bytes(self._cache),
            },
            "aside_bytes_peak": max(self._aside),
            "rows_at_the_end": [layer.get_seq_length() for layer in self._cache.layers],
            "mean_rows_timed": round(statistics.mean(row for step in timed for row in step), 2),
            "compressions": {"all": sum(drops), "timed": sum(drops[self._lead - 1 :])},
        }


def storage_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the distinct storages behind tensors."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def cache_bytes(cache: Any) -> int:
    """Bytes that a cache really holds: by its own account where it has one, else of its keys and values."""
    own = getattr(cache, "bytes", None)
    if isinstance(own, int):
        return own
    parts = [part for layer in cache.layers for part in (layer.keys, layer.values)]
    return storage_bytes(part for part in parts if isinstance(part, torch.Tensor))


def run(side: Plain, prefix: Prefix, cell: Cell, record: bool = False) -> dict[str, Any]:
    """Decode once.

    Args:
        side: How.
        prefix: From where.
        cell: How far.
        record: Count memory and return the tokens; the seconds of such a run mean nothing.

    Returns:
        `seconds` by unit; recorded also `tokens`, `memory` and, on CUDA, `device_bytes`, without what was there before.
    """
    gc.collect()
    cuda = side.model.device.type == "cuda"
    before = 0
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        cache = side.cache(prefix)
        ledger = stack.enter_context(Ledger(side, cell.lead)) if record else None
        stack.enter_context(side.around(cell))
        with Watch(side.model, cell.lead) as watch:
            tokens = side.decode(prefix, cache, cell)
        if ledger is None:
            return {"seconds": watch.seconds}
        result = {"seconds": watch.seconds, "tokens": tokens, "memory": ledger.summary()}
    if cuda:
        result["device_bytes"] = {name: value - before for name, value in watch.device_bytes.items()}
    return result


def measure(
    arms: dict[str, Callable[[bool], dict[str, Any]]], cell: Cell, rounds: int, tick: Callable[[str], None] = print
) -> dict[str, Any]:
    """Run all arms in turn: a recorded round that also warms up, then the timed ones, each from another arm on.

    Args:
        arms: Runs by name; an answer with `error` takes the arm out. Ratios are to the first.
        cell: What they run.
        rounds: Timed rounds.
        tick: Told the name of the arm before every run.

    Returns:
        The cell and for every arm its median seconds, tokens a second, memory, ratio (median over rounds, and its
        range), whether its tokens are those of the first, and all runs.
    """
    recorded, failed = {}, {}
    for name, arm in arms.items():
        tick(name)
        answer = arm(True)
        (failed if "error" in answer else recorded)[name] = answer
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in recorded}
    for number in range(rounds):
        names = list(recorded)
        start = number % max(1, len(names))
        for name in names[start:] + names[:start]:
            tick(name)
            runs[name].append(arms[name](False)["seconds"])
    first = next(iter(runs), None)
    sides: dict[str, Any] = {name: {"error": answer["error"]} for name, answer in failed.items()}
    for name, seconds in runs.items():
        answer = dict(recorded[name])
        tokens = answer.pop("tokens")
        answer["seconds"] = {unit: round(statistics.median(s[unit] for s in seconds), 5) for unit in UNITS}
        answer["tokens_per_second"] = round(cell.batch * cell.new / answer["seconds"]["wall"], 2)
        ratios = {unit: [s[unit] / base[unit] for s, base in zip(seconds, runs[first])] for unit in UNITS}
        answer["ratio"] = {unit: round(statistics.median(values), 4) for unit, values in ratios.items()}
        answer["ratio_range"] = {unit: [round(f(values), 4) for f in (min, max)] for unit, values in ratios.items()}
        answer["same_tokens"] = tokens == recorded[first]["tokens"]
        answer["runs"] = [{unit: round(s[unit], 5) for unit in UNITS} for s in seconds]
        sides[name] = answer
    return {**asdict(cell), "rounds": rounds, "sides": {name: sides[name] for name in arms}}


def presses() -> dict[str, Callable[[Cell], Any] | None]:
    """Presses that decode and free memory, by name; `none` has none."""
    import kvpress

    def decoding(base: Callable[[], Any]) -> Callable[[Cell], Any]:
        return lambda cell: kvpress.DecodingPress(base(), cell.interval, cell.budget)

    return {
        "none": None,
        "knorm": decoding(kvpress.KnormPress),
        "keydiff": decoding(kvpress.KeyDiffPress),
        "snapkv": decoding(lambda: kvpress.SnapKVPress(window_size=WINDOW, kernel_size=KERNEL)),
        "tova": decoding(kvpress.TOVAPress),
        "streaming_llm": decoding(lambda: kvpress.StreamingLLMPress(n_sink=SINKS)),
    }


class Worker:
    """A model and the presses, answering requests.

    Args:
        settings: See the top of the file.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        if settings.get("threads"):
            torch.set_num_threads(settings["threads"])
        dtype, device = getattr(torch, settings["dtype"]), settings["device"]
        if "folder" in settings:
            model = AutoModelForCausalLM.from_pretrained(settings["folder"], dtype=dtype).to(device)
        else:
            torch.manual_seed(settings["seed"])
            with torch.device(device):
                model = AutoModelForCausalLM.from_config(LlamaConfig(**settings["config"]), dtype=dtype)
        self._sides = {name: Plain(model.eval(), press) for name, press in presses().items()}
        self._model, self._prefix = model, (None, None)

    def answer(self, side: str, cell: Cell, record: bool) -> dict[str, Any]:
        """One run; whatever goes wrong in it is an answer too."""
        try:
            if self._prefix[0] != cell:
                self._prefix = (None, None)
                self._prefix = (cell, Prefix(self._model, cell))
            return run(self._sides[side], self._prefix[1], cell, record)
        except Exception as error:
            return {"error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}
        finally:
            if self._model.device.type == "cuda":
                torch.cuda.empty_cache()

    def serve(self, requests: Iterable[str], write: Callable[[str], Any]) -> None:
        """Answer line by line until the input ends; the first line says which versions answer."""
        write(json.dumps({"versions": versions()}) + "\n")
        for line in requests:
            request = json.loads(line)
            write(json.dumps(self.answer(request["side"], Cell(**request["cell"]), request["record"])) + "\n")


def versions() -> dict[str, str]:
    """What runs here."""
    return {"kvpress": version("kvpress"), "transformers": transformers.__version__, "torch": torch.__version__}


def main() -> None:
    """Answer requests, or run what the settings say and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", type=Path)
    parser.add_argument("--serve", action="store_true", help="one request a line on stdin, one answer a line on stdout")
    options = parser.parse_args()
    settings = json.loads(options.settings.read_text(encoding="utf-8"))
    out, sys.stdout = sys.stdout, sys.stderr  # libraries print too

    def write(text: str) -> None:
        out.write(text)
        out.flush()

    gc.freeze()
    worker = Worker(settings)
    if options.serve:
        worker.serve(sys.stdin, write)
        return
    cells = []
    for values in settings["cells"]:
        cell = Cell(**values)
        arms = {
            name: lambda record, name=name, cell=cell: worker.answer(name, cell, record)
            for name in settings.get("presses", list(presses()))
        }
        cells.append(measure(arms, cell, settings.get("rounds", 3)))
    write(json.dumps({"versions": versions(), "threads": torch.get_num_threads(), "cells": cells}, indent=2) + "\n")


if __name__ == "__main__":
    main()
