"""Arms of reading passages and answering, from compressed passages and from the full text, and what their times say."""

from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

from experiments.benchmarks import break_even
from experiments.benchmarks.break_even import Cost
from experiments.benchmarks.meters import Arm
from experiments.benchmarks.rounds import Medians, described
from experiments.benchmarks.squad_models import KEEPERS, Sizes, backbone, draw, maker
from kvc.cache.memory import KVMemory
from kvc.core.backbone import decoder
from kvc.core.seeds import DEFAULT_SEED
from kvc.generation.decode import generate
from kvc.methods.gist.reading import GistReader, GistToken
from kvc.methods.gist.sequence import CONTEXT, GIST, HEAD, sequence
from kvc.methods.squad import Anchors, FixedRatio, Source
from kvc.methods.squad.assembly import LmInput, assemble, tokens
from kvc.methods.squad.baselines import nothing
from kvc.methods.squad.interface import Slots
from kvc.methods.squad.readers import AnchorReader, SlotReader
from kvc.methods.squad.reading import Tokens
from kvc.methods.squad.scale import embedding_rms
from kvc.methods.squad.source import EMBEDDINGS


class Serving(NamedTuple):
    """Arms of one case, and what reading leaves in memory."""

    arms: dict[str, Arm]
    memories: dict[str, KVMemory]


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
