"""Compressed passages beside the full text: reading, answering, memory, and when the compressor's cost is paid back.

    python -m experiments.benchmarks.squad --out experiments/results/squad_cpu.json
    python -m experiments.benchmarks.squad --shape llama8b --device cuda --out experiments/results/squad_gpu.json

`serving`, by batch and length of the passage (a passage for each row), at one slot for `--ratio` tokens, arms:

* `read_full`: head and passage into a KV cache; `read_slots`: head and slots
* `compress_NAME`: source states and compressor; contextual states, or `NAME_embeddings`
* `read_anchors`, `read_gist`: the passage is read and all but some rows of KV is dropped
* `first_X`, `answer_X`: question and first token, or `--new_tokens`, after what `full`, `slots`, `anchors`, `gist` left

`kv_bytes` are those of the whole batch, really held after reading (`kvc.cache.accounting`). `seconds_per_token` is a
decode step of the batch. Weights are random and adapters merged; lengths, not words, decide the time.

`break_even`: questions on one passage from which a compressor takes no longer than the full text. `kept`: what was read
stays in memory between questions, in either case. `reread`: keys and values do not stay; the text is read again for
each question, or the slots are, which were stored; anchors and gist rows are keys and values and stay. `length`: tokens
of a passage from which it pays at so many questions. null is never, as far as measured.

`training`: forward and backward of a step of `ContextCompressor` (LoRA on all linear layers, distillation and teacher
forcing; `full_text` is the control), without the optimizer; on a GPU with gradient checkpointing, where anchors allow
it, and one model after the other. Tokens are those of the text, answer included.

Arms run in turn; medians over rounds, ratios of medians, intervals that resample rounds. On a shared machine the
processor seconds say more than the wall clock. Peak memory is that of one run beyond model and input: on a CPU of a
process of its own, on a GPU what was allocated.
"""

import argparse
import gc
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from experiments.benchmarks import break_even
from experiments.benchmarks.break_even import Cost
from experiments.benchmarks.ccm import SHAPES as LLAMAS
from experiments.benchmarks.ccm import Arm
from experiments.benchmarks.decode import device_name
from experiments.benchmarks.rounds import UNITS, Medians, described, medians, peaks, run
from kvc.cache.memory import KVMemory
from kvc.core.backbone import Backbone, Lora, decoder
from kvc.core.files import write_json
from kvc.core.seeds import DEFAULT_SEED
from kvc.errors import UserError
from kvc.generation.decode import generate
from kvc.methods.gist.reading import GistReader, GistToken
from kvc.methods.gist.sequence import CONTEXT, GIST, HEAD, sequence
from kvc.methods.squad import (
    Anchors,
    ContextCompressor,
    Convolution,
    CrossAttention,
    FixedRatio,
    Latent,
    MeanPool,
    Source,
    WeightedPooling,
)
from kvc.methods.squad.assembly import LmInput, assemble, tokens
from kvc.methods.squad.baselines import nothing
from kvc.methods.squad.interface import Slots
from kvc.methods.squad.readers import AnchorReader, SlotReader
from kvc.methods.squad.reading import Tokens
from kvc.methods.squad.scale import embedding_rms
from kvc.methods.squad.source import EMBEDDINGS
from kvc.runs import provenance

SHAPES: dict[str, dict[str, Any]] = {"tiny": {}, **{name: LLAMAS[name] for name in ("llama1b", "llama8b")}}
"""Fields of a Llama with random weights; those of the tiny model where none is given."""
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
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


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


class Serving(NamedTuple):
    """Arms of one case, and what reading leaves in memory."""

    arms: dict[str, Arm]
    memories: dict[str, KVMemory]


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


# ---------------------------------------------------------------------- serving


def serving(sizes: Sizes, ways: list[str], device: str) -> Serving:
    """Arms of reading and answering, ready to run in any order."""
    torch.manual_seed(DEFAULT_SEED)
    with torch.device(device):
        model: Any = backbone(sizes, device).load().eval()
    batch = draw(sizes, model.config.vocab_size, device)
    head, context, tail = (Tokens.of(batch, part) for part in ("head", "context", "tail"))
    table, budget = model.get_input_embeddings(), FixedRatio(sizes.ratio)
    arms: dict[str, Arm] = {}
    whole = Slots(table(context.ids), context.mask, {})
    arms["read_full"] = partial(read, model, whole_input(table, head, whole, tail))
    made: Slots | None = None
    for way in ways:
        if way == "gist":
            reader = GistReader(model, GistToken(table))
            arms["read_gist"] = partial(_gist, reader, batch, budget)
        elif way == "anchors":
            marks = Anchors(table.weight.shape[1], embedding_rms(table)).to(device, model.dtype)
            arms["read_anchors"] = partial(_anchors, AnchorReader(marks), model, head, context, budget)
        else:
            source = Source(EMBEDDINGS) if way.endswith("_embeddings") else Source()
            name = way.removesuffix("_embeddings")
            with torch.device(device):
                compressor = maker(name, sizes)(table.weight.shape[1], embedding_rms(table))
            compressor.to(model.dtype).eval()
            slots = SlotReader(source, compressor, sizes.max_length, "compact")
            arms[f"compress_{way}"] = partial(_slots, slots, model, head, context, budget)
            made = arms[f"compress_{way}"]().slots
    if made is not None:
        arms["read_slots"] = partial(read, model, whole_input(table, head, made, tail))
    memories = {name.removeprefix("read_"): arm() for name, arm in arms.items() if name.startswith("read_")}
    for name, memory in memories.items():
        for what, count in (("first", 1), ("answer", sizes.answer)):
            arms[f"{what}_{name}"] = partial(_answer, model, tail.ids, memory, count)
    return Serving(arms, memories)


@torch.no_grad()
def whole_input(table: torch.nn.Module, head: Tokens, slots: Slots, tail: Tokens) -> LmInput:
    """Head and slots as the model reads them; the question comes later."""
    return assemble(tokens(table, *head), slots, tokens(table, *nothing(tail)))


@torch.no_grad()
def read(model: Any, given: LmInput) -> KVMemory:
    """Keys and values of an input."""
    memory, mask = KVMemory(model), given.attention_mask
    stack: Any = decoder(model)
    stack(inputs_embeds=given.inputs_embeds, **memory.forward_kwargs(mask, mask), use_cache=True)
    return memory


@torch.no_grad()
def _slots(reader: SlotReader, model: Any, head: Tokens, context: Tokens, budget: FixedRatio) -> Any:
    return reader.read(model, head, context, budget)


@torch.no_grad()
def _anchors(reader: AnchorReader, model: Any, head: Tokens, context: Tokens, budget: FixedRatio) -> KVMemory:
    found: Any = reader.read(model, head, context, budget)
    memory: KVMemory = found.memory
    return memory


@torch.no_grad()
def _gist(reader: GistReader, batch: dict[str, Any], budget: FixedRatio) -> KVMemory:
    counts = budget.counts(batch["context_mask"].sum(1))
    return reader.compress(sequence(batch, counts, (HEAD, CONTEXT, GIST), left=True))


def _answer(model: Any, ids: torch.Tensor, memory: KVMemory, count: int) -> Any:
    return generate(model, ids, max_new_tokens=count, memory=memory.fork(), eos_token_id=())


def costs(found: Medians, way: str) -> dict[str, tuple[Cost, Cost]]:
    """A compressor's cost and that of the full text, by what stays between questions."""
    full = Cost(found["read_full"], found["answer_full"])
    again = Cost(np.zeros_like(full.once), full.once + full.each)
    if way in KEEPERS:
        ours = Cost(found[f"read_{way}"], found[f"answer_{way}"])
        return {"kept": (ours, full), "reread": (ours, again)}
    made, slots, answered = found[f"compress_{way}"], found["read_slots"], found["answer_slots"]
    return {"kept": (Cost(made + slots, answered), full), "reread": (Cost(made, slots + answered), again)}


def figures(found: Medians, ways: list[str], sizes: Sizes) -> dict[str, Any]:
    """What the times of a case say."""
    arms = {arm: [name for name in found if name.split("_")[0] in arm] for arm in (("read", "compress"), ("answer",))}
    base = {("read", "compress"): "read_full", ("answer",): "answer_full"}
    left = [name.removeprefix("answer_") for name in found if name.startswith("answer_")]
    result: dict[str, Any] = {"seconds": {name: described(values) for name, values in found.items()}}
    for group, names in arms.items():
        full = found[base[group]]
        result[f"ratio_to_{base[group]}"] = {n: described(found[n] / full) for n in names if n != base[group]}
    if sizes.answer > 1:
        steps = {name: (found[f"answer_{name}"] - found[f"first_{name}"]) / (sizes.answer - 1) for name in left}
        result["seconds_per_token"] = {name: described(values) for name, values in steps.items()}
        result["ratio_per_token"] = {n: described(v / steps["full"]) for n, v in steps.items() if n != "full"}
    result["break_even"] = {
        way: {mode: described(break_even.questions(*pair)) for mode, pair in costs(found, way).items()} for way in ways
    }
    return result


def lengths_that_pay(cases: list[tuple[int, Medians]], ways: list[str], counts: list[int]) -> dict[str, Any]:
    """Tokens of a passage from which each way pays, by what stays and number of questions."""
    cases = sorted(cases, key=lambda case: case[0])
    result: dict[str, Any] = {}
    for way in ways:
        pairs = [costs(found, way) for _, found in cases]
        for mode in pairs[0]:
            for count in counts:
                extra = [pair[mode][0].total(count) - pair[mode][1].total(count) for pair in pairs]
                pays = described(break_even.length([length for length, _ in cases], extra))
                result.setdefault(way, {}).setdefault(mode, {})[str(count)] = pays
    return result


def measure_serving(options: argparse.Namespace, device: str) -> dict[str, Any]:
    """Every case, and from which length on compressing pays."""
    cases, lengths = [], []
    for batch in options.batches:
        timed: dict[str, list[tuple[int, Medians]]] = {unit: [] for unit in UNITS}
        for context in sorted(options.contexts):
            sizes = sizes_of(options, batch, context)
            arms, memories = serving(sizes, options.compressors, device)
            found = run(arms, options.rounds, device)
            held = {name: memory.bytes for name, memory in memories.items()}
            case: dict[str, Any] = {
                "batch": batch,
                "context": context,
                "rows": {name: float(memory.tokens[0]) for name, memory in memories.items()},
                "kv_bytes": held,
                "kv_share": {name: round(size / held["full"], 4) for name, size in held.items()},
            }
            for unit in UNITS:
                timed[unit].append((context, medians(found, unit)))
                case[unit] = figures(timed[unit][-1][1], options.compressors, sizes)
            memories.clear()
            case["peak_mib"] = peak_mib("serving", sizes, options.compressors, device, arms)
            del arms
            gc.collect()
            print(case, flush=True)
            cases.append(case)
        for unit, each in timed.items():
            pays = lengths_that_pay(each, options.compressors, options.questions)
            lengths.append({"batch": batch, "unit": unit, "length": pays})
    return {"cases": cases, "break_even": lengths}


# ---------------------------------------------------------------------- training


def training(sizes: Sizes, names: list[str], device: str) -> Serving:
    """One arm for each method: forward and backward of a step; gradients are there afterwards."""
    arms: dict[str, Arm] = {}
    for name in names:
        torch.manual_seed(DEFAULT_SEED)
        base = backbone(
            sizes,
            device,
            lora=Lora(r=16, alpha=32, dropout=0.0, targets=LINEAR),
            gradient_checkpointing=device == "cuda" and name != "anchors",
        )
        settings: dict[str, Any] = {"mode": "full_text"}
        if name != "full_text":
            settings = {"compressor": maker(name, sizes), "budget": FixedRatio(sizes.ratio)}
            settings |= {} if name == "anchors" else {"source": Source(frozen=False)}
        with torch.device(device):
            method = ContextCompressor(base, max_length=sizes.max_length, **settings)
        method.train()
        batch = draw(sizes, method.backbone.config.vocab_size, device)
        arms[name] = partial(step, method, batch)
    return Serving(arms, {})


def step(method: ContextCompressor, batch: dict[str, Any]) -> float:
    """Loss of an answer token."""
    method.zero_grad()
    device = method.backbone.device.type
    with torch.autocast(device, torch.bfloat16) if device == "cuda" else nullcontext():
        output = method.step(batch)
        loss = output.loss_sum / output.num_tokens
    loss.backward()
    return float(loss.detach())


def groups(options: argparse.Namespace, device: str) -> Iterator[list[str]]:
    """Methods that are in memory at once."""
    yield from [[name] for name in options.trained] if device == "cuda" else [options.trained]


def measure_training(options: argparse.Namespace, device: str) -> list[dict[str, Any]]:
    """Steps of each method; ratios to the first one."""
    sizes = sizes_of(options, options.train_batch, options.train_context)
    count = sizes.batch * (sizes.head + sizes.context + sizes.tail + sizes.answer)
    cases = []
    for names in groups(options, device):
        arms = training(sizes, names, device).arms
        sizes_found = {name: arm.args[0].sizes() for name, arm in arms.items()}  # type: ignore[attr-defined]
        found = run(arms, options.rounds, device)
        peak = peak_mib("training", sizes, names, device, arms)
        times = {unit: medians(found, unit) for unit in UNITS}
        for name in names:
            case: dict[str, Any] = {"method": name, "tokens": count, **sizes_found[name], "peak_mib": peak[name]}
            for unit, each in times.items():
                case[unit] = {"seconds": described(each[name]), "tokens_per_second": described(count / each[name])}
                if name != names[0]:
                    case[unit][f"ratio_to_{names[0]}"] = described(each[name] / each[names[0]])
            print(case, flush=True)
            cases.append(case)
        # The next model may not fit beside it.
        del arms
        gc.collect()
    return cases


# ---------------------------------------------------------------------- memory


BUILDERS = {"serving": serving, "training": training}


def peak_mib(part: str, sizes: Sizes, names: list[str], device: str, arms: dict[str, Arm]) -> dict[str, float]:
    """Memory that one run of each arm needs, MiB."""
    found = peaks(arms, device) if device == "cuda" else _in_child(part, sizes, names)
    return {name: round(size / 2**20, 2) for name, size in found.items()}


def _in_child(part: str, sizes: Sizes, names: list[str]) -> dict[str, int]:
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(part, sizes, names, torch.get_num_threads(), sender))
    # What is freed goes back at once; read by the C library when a process starts.
    os.environ |= dict.fromkeys(("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"), "65536")
    child.start()
    sender.close()
    try:
        found: dict[str, int] = receiver.recv()
        return found
    finally:
        child.join()


def _child(part: str, sizes: Sizes, names: list[str], threads: int, pipe: Any) -> None:
    torch.set_num_threads(threads)
    pipe.send(peaks(BUILDERS[part](sizes, names, "cpu").arms, "cpu"))


# ---------------------------------------------------------------------- the command


def sizes_of(options: argparse.Namespace, batch: int, context: int) -> Sizes:
    """Sizes of one case."""
    return Sizes(
        options.shape,
        batch,
        context,
        options.head,
        options.tail,
        options.new_tokens,
        options.ratio,
        options.max_length,
    )


PARTS: dict[str, Callable[[argparse.Namespace, str], Any]] = {"serving": measure_serving, "training": measure_training}


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--parts", choices=tuple(PARTS), nargs="+", default=list(PARTS))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, help="processor threads; the machine's number by default")
    parser.add_argument("--shape", choices=tuple(SHAPES), default="tiny", help="llama8b only on a GPU")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--contexts", type=int, nargs="+", default=[128, 512, 2048], help="tokens of a passage")
    parser.add_argument("--ratio", type=float, default=8.0, help="tokens of a slot")
    parser.add_argument(
        "--compressors",
        choices=WAYS,
        nargs="+",
        default=["mean_pool", "mean_pool_embeddings", "cross_attention_embeddings", "anchors", "gist"],
    )
    parser.add_argument("--questions", type=int, nargs="+", default=[1, 4, 16, 64], help="on one passage")
    parser.add_argument("--head", type=int, default=4, help="tokens before the passage")
    parser.add_argument("--tail", type=int, default=24, help="tokens of a question")
    parser.add_argument("--new_tokens", type=int, default=16, help="of an answer")
    parser.add_argument("--max_length", type=int, default=512, help="tokens that are compressed at once")
    parser.add_argument("--trained", choices=TRAINED, nargs="+", default=["full_text", "mean_pool", "cross_attention"])
    parser.add_argument("--train_batch", type=int, default=8)
    parser.add_argument("--train_context", type=int, default=512)
    return parser


def main(words: list[str] | None = None) -> None:
    """Measure, and write the figures after every part."""
    options = arguments().parse_args(words)
    device = options.device
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device: there is no CUDA device")
    if device == "cpu" and options.shape == "llama8b":
        raise UserError("--shape: llama8b needs --device cuda")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    settings = {name: value for name, value in vars(options).items() if name not in ("out", "parts", "device")}
    result: dict[str, Any] = {
        "what": "median seconds and ratios of interleaved runs; see experiments/benchmarks/squad.py",
        "settings": {**settings, "dtype": "bfloat16" if device == "cuda" else "float32"},
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg(),
        **provenance(),
    }
    for part in options.parts:
        start = time.perf_counter()
        result[part] = PARTS[part](options, device)
        result[f"{part}_took_seconds"] = round(time.perf_counter() - start, 1)
        write_json(options.out, result)
    print(f"-> {options.out}")


if __name__ == "__main__":
    main()
