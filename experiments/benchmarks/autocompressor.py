"""AutoCompressor: a training step in substeps beside the plain one.

    python -m experiments.benchmarks.autocompressor --out experiments/results/autocompressor_cpu.json

Both read the same blocks, K substeps of S segments, and give the same loss and gradients:

* `ours`: `substep_readings`; the LM head works on targets only, the last segment of the block is not summarised,
  gradients are summed over processes once
* `plain`: for each segment a full forward of the stock model over soft prompt, text and summary slots, logits of all of
  them, every segment summarised, gradients summed over processes after every substep

`checkpointed` is ours with `segment_gradient_checkpointing`. Arms run in turn, each round beginning with another;
medians over rounds, ratios of medians. The sum over processes is made in a group of one, which costs its calls and
copies but no network. Peak memory is that of one step beyond model and input: on a CPU of a process of its own, on a
GPU what was allocated. With more substeps the block grows, and with it the soft prompt of vectors that accumulate;
`replaced` is the peak where only the vectors of the last segment stay, so that all substeps read as much.
"""

import argparse
import os
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig

from experiments.benchmarks.ccm import SHAPES, race
from experiments.benchmarks.decode import device_name
from experiments.benchmarks.meters import in_child, peak_of
from kvc.core.files import write_json
from kvc.core.seeds import DEFAULT_SEED
from kvc.errors import UserError
from kvc.methods.autocompressor.compressor import Compressor
from kvc.methods.autocompressor.fixed import FixedSummary
from kvc.methods.autocompressor.substeps import fixed_substeps, substep_readings
from kvc.runs import provenance

ARMS = ("ours", "checkpointed", "plain")


class Sizes(NamedTuple):
    """What a step reads.

    Attributes:
        shape: Key of `SHAPES`.
        batch: Blocks.
        segments: Of a substep.
        length: Tokens of a segment.
        summary: Summary vectors of a segment.
        accumulate: Vectors of all segments stay.
    """

    shape: str
    batch: int
    segments: int
    length: int
    summary: int
    accumulate: bool = True


def make_compressor(sizes: Sizes, device: str) -> Compressor:
    """A random model of which every weight is trained, in train mode."""
    torch.manual_seed(DEFAULT_SEED)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**{**SHAPES[sizes.shape], "eos_token_id": 2}))
    return Compressor(model.train(), FixedSummary(model, sizes.summary, sizes.accumulate))


def draw(sizes: Sizes, substeps: int, device: str) -> torch.Tensor:
    """Random blocks `[B, L]`."""
    generator = torch.Generator().manual_seed(DEFAULT_SEED)
    shape = (sizes.batch, substeps * sizes.segments * sizes.length)
    return torch.randint(SHAPES[sizes.shape]["vocab_size"], shape, generator=generator).to(device)


def parameters(compressor: Compressor) -> list[torch.nn.Parameter]:
    """Everything that is trained."""
    return [*compressor.model.parameters(), *compressor.summary.parameters()]


def reduce(compressor: Compressor) -> None:
    """Sum gradients over processes, in one piece, where there is a group."""
    if not torch.distributed.is_initialized():
        return
    gradients = [p.grad for p in parameters(compressor) if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    torch.distributed.all_reduce(flat)
    pieces = flat.split([gradient.numel() for gradient in gradients])
    torch._foreach_copy_(gradients, [piece.view_as(gradient) for piece, gradient in zip(pieces, gradients)])


def autocast(compressor: Compressor) -> Any:
    """bf16 on a GPU."""
    device = compressor.model.device.type
    return torch.autocast(device, torch.bfloat16) if device == "cuda" else nullcontext()


def step(compressor: Compressor, arm: str, ids: torch.Tensor, sizes: Sizes, substeps: int) -> float:
    """One training step: the summed loss of all substeps; gradients are there afterwards."""
    for parameter in parameters(compressor):
        parameter.grad = None
    if arm == "plain":
        return plain_step(compressor, ids, sizes, substeps)
    compressor.segment_gradient_checkpointing = arm == "checkpointed"
    plan = fixed_substeps(ids.shape[1], substeps, [sizes.length] * sizes.segments)
    total = 0.0
    for read, part in zip(substep_readings(compressor, plan, ids), plan):
        with autocast(compressor):
            loss, _ = compressor.loss(read(), ids[:, part.columns])
        loss.backward()
        total += float(loss.detach())
    reduce(compressor)
    return total


def plain_step(compressor: Compressor, ids: torch.Tensor, sizes: Sizes, substeps: int) -> float:
    """The same without anything spared."""
    model: Any = compressor.model
    summary: Any = compressor.summary
    table = model.get_input_embeddings()
    prompt = table(ids[:, :0])
    total = 0.0
    for block in ids.chunk(substeps, dim=1):
        with autocast(compressor):
            slots = summary.embed_summary.weight.expand(len(ids), -1, -1)
            logits = []
            for segment in block.split(sizes.length, dim=1):
                inputs = torch.cat([prompt, table(segment), slots], dim=1)
                mask = torch.ones(inputs.shape[:2], dtype=torch.int64, device=ids.device)
                output = model(inputs_embeds=inputs, attention_mask=mask, use_cache=False, output_hidden_states=True)
                start = prompt.shape[1]
                logits.append(output.logits[:, start : start + sizes.length])
                prompt = torch.cat([prompt, output.hidden_states[-1][:, start + sizes.length :]], dim=1)
            predicted = torch.cat(logits, dim=1)[:, :-1]
            loss = F.cross_entropy(predicted.flatten(0, 1).float(), block[:, 1:].flatten(), reduction="sum")
        loss.backward()
        reduce(compressor)
        prompt = prompt.detach()
        total += float(loss.detach())
    return total


# ---------------------------------------------------------------------- memory


def _peak_on_cpu(sizes: Sizes, arm: str, substeps: int) -> int:
    compressor = make_compressor(sizes, "cpu")
    small = sizes._replace(length=4)
    step(compressor, arm, draw(small, 1, "cpu"), small, 1)
    return peak_of(lambda: step(compressor, arm, draw(sizes, substeps, "cpu"), sizes, substeps), "cpu")


def peak_bytes(compressor: Compressor, sizes: Sizes, arm: str, substeps: int) -> int:
    """Memory that one step needs beyond the model and what a first step leaves."""
    if compressor.model.device.type == "cuda":
        ids = draw(sizes, substeps, "cuda")
        return peak_of(lambda: step(compressor, arm, ids, sizes, substeps), "cuda")
    return int(in_child(_peak_on_cpu, sizes, arm, substeps, give_back=True))


def measure(sizes: Sizes, counts: Sequence[int], rounds: int, device: str) -> list[dict[str, Any]]:
    """All arms, by number of substeps."""
    compressor = make_compressor(sizes, device)
    alone = sizes._replace(accumulate=False)
    replaced = make_compressor(alone, device), alone
    cases = []
    for substeps in counts:
        ids = draw(sizes, substeps, device)
        arms = {arm: lambda arm=arm: step(compressor, arm, ids, sizes, substeps) for arm in ARMS}  # noqa: B023
        case = {"substeps": substeps, "tokens": ids.shape[1], **race(arms, rounds, device)}
        case["loss"] = {arm: round(arms[arm]() / ids.numel(), 5) for arm in ARMS}
        case["peak_mib"] = {arm: round(peak_bytes(compressor, sizes, arm, substeps) / 2**20, 1) for arm in ARMS}
        case["peak_mib"]["replaced"] = round(peak_bytes(*replaced, "ours", substeps) / 2**20, 1)
        print(case, flush=True)
        cases.append(case)
    return cases


def main(words: list[str] | None = None) -> None:
    """Measure, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, help="processor threads; the machine's number by default")
    parser.add_argument("--shape", choices=tuple(SHAPES), default="small")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--segments", type=int, default=2, help="of a substep")
    parser.add_argument("--length", type=int, default=256, help="tokens of a segment")
    parser.add_argument("--summary", type=int, default=50, help="summary vectors of a segment")
    parser.add_argument("--substeps", type=int, nargs="+", default=[1, 2, 4, 8])
    options = parser.parse_args(words)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device: there is no CUDA device")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    sizes = Sizes(options.shape, options.batch, options.segments, options.length, options.summary)
    with tempfile.TemporaryDirectory() as folder:
        backend = "nccl" if options.device == "cuda" else "gloo"
        place = (Path(folder) / "group").as_uri()
        torch.distributed.init_process_group(backend, init_method=place, rank=0, world_size=1)
        try:
            cases = measure(sizes, options.substeps, options.rounds, options.device)
        finally:
            torch.distributed.destroy_process_group()
    write_json(
        options.out,
        {
            "what": "median seconds and ratios of interleaved runs; see experiments/benchmarks/autocompressor.py",
            "device": device_name(options.device),
            "threads": torch.get_num_threads(),
            "load_average": os.getloadavg(),
            "rounds": options.rounds,
            "sizes": {**sizes._asdict(), **SHAPES[options.shape]},
            **provenance(),
            "training": cases,
        },
    )


if __name__ == "__main__":
    main()
