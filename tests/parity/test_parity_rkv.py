"""R-KV, SnapKV, StreamingLLM and kvpress against numbers of the originals: one test per case file, whatever its name.

The small set beside this file ships; `--reference DIR` runs over all of `DIR/rkv`.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from kvc.cache.memory import KVMemory
from kvc.eviction.eviction import Eviction
from kvc.eviction.importance import past_importance
from kvc.eviction.policy import Policy, View
from kvc.eviction.redundancy import redundancy
from kvc.eviction.registry import make_policy
from kvc.eviction.triggers import NewlineIds, StepPhase
from kvc.generation.decode import generate
from kvc.generation.sampling import Forced

Tensors = dict[str, torch.Tensor]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    folder = metafunc.config.getoption("--reference") / "rkv"
    for kind in ("single", "multiround", "e2e"):
        if kind in metafunc.fixturenames:
            files = [path for path in sorted(folder.glob(f"{kind}_*.safetensors")) if "weights" not in path.stem]
            metafunc.parametrize(kind, files, ids=lambda path: path.stem)


def policy_of(config: dict[str, Any], method: str) -> Policy:
    if method == "streamingllm":
        return make_policy("streaming_llm", sinks=config["first_tokens"])
    names = {"window_size": "window", "kernel_size": "kernel_size"}
    if method == "rkv":
        names |= {name: name for name in ("mix_lambda", "retain_ratio", "retain_direction")}
    return make_policy(
        method, order="score", **{ours: config[theirs] for theirs, ours in names.items() if theirs in config}
    )


def plain_view(keys: torch.Tensor, queries: torch.Tensor) -> View:
    positions = torch.arange(keys.shape[2]).expand(keys.shape[:3])
    return View(keys, keys, positions, queries)


def entry(path: Path) -> dict[str, Any]:
    return json.loads((path.parent / "index.json").read_text())["files"][path.name]


def test_the_reference_holds_cases(reference: Path) -> None:
    for kind in ("single", "multiround", "e2e", "kvpress"):
        assert list((reference / "rkv").glob(f"{kind}_*.safetensors")), f"{reference}/rkv holds no {kind} case"


def test_one_compression(single: Path) -> None:
    tensors, about = load_file(single), entry(single)
    view = plain_view(tensors["key"], tensors["query"])
    exact = about["dtype"] == "f32"
    kept, same_set, same_order = 0, 0, 0
    for config in about["configs"]:
        expected = tensors[f"idx.{config['i']:03d}"].long()
        found = policy_of(config, config["method"]).select(view, config["budget"])
        assert found.shape == expected.shape
        if exact:
            assert torch.equal(found, expected), config
        kept += expected.numel()
        same_set += int((found[..., None] == expected[..., None, :]).any(-1).sum())
        same_order += int((found == expected).sum())
    assert same_set >= 0.999 * kept
    assert same_order >= 0.99 * kept


def test_scores_of_one_compression(single: Path) -> None:
    tensors, about = load_file(single), entry(single)
    keys, queries = tensors["key"], tensors["query"]
    near = {"rtol": 1e-5, "atol": 1e-7} if about["dtype"] == "f32" else {"rtol": 0.01, "atol": 1e-4}
    redundant = redundancy(keys, rounded=True)
    torch.testing.assert_close(redundant[0], tensors["inter.redundancy_last_full"], **near)
    torch.testing.assert_close(past_importance(queries, keys, 8, 1), tensors["inter.importance_mean_w8"], **near)
    torch.testing.assert_close(past_importance(queries, keys, 8, 7), tensors["inter.importance_pooled_w8_k7"], **near)
    view = plain_view(keys, queries)
    for config in about["configs"]:
        if (expected := tensors.get(f"score.{config['i']:03d}")) is not None:
            found = policy_of(config, config["method"]).score(view, expected.shape[-1], 0)
            torch.testing.assert_close(found, expected, **near)


def test_rounds_of_compression(multiround: Path) -> None:
    """Plain tensors stand in for the memory: append, select, gather, as often as the original did."""
    tensors, about = load_file(multiround), entry(multiround)
    inputs = load_file(multiround.parent / about["inputs_in"])
    config = about["config"]
    policy = policy_of(config, about["method"])
    end = about["L0"]
    positions = torch.arange(end).expand(1, inputs["key"].shape[1], -1)
    for number in range(about["rounds"] + 1):
        keys = inputs["key"].gather(2, positions[..., None].expand(-1, -1, -1, inputs["key"].shape[-1]))
        queries = inputs["query"][:, :, end - 8 : end]
        indices = policy.select(View(keys, keys, positions, queries), config["budget"])
        positions = positions.gather(2, indices)
        expected = tensors[f"round{number}.kept_positions"].long()
        assert torch.equal(positions, expected), f"round {number}"
        new = torch.arange(end, end + about["step"]).expand(*positions.shape[:2], -1)
        positions = torch.cat([positions, new], -1)
        end += about["step"]


class Replay(Forced):
    """Feeds the reference's tokens, and remembers what the loop offered instead."""

    def __init__(self, tokens: torch.Tensor, memory: KVMemory) -> None:
        super().__init__([tokens.tolist()])
        self.memory, self.logits, self.lengths, self.next = memory, [], [], []

    def __call__(self, logits: torch.Tensor, rows: Any) -> torch.Tensor:
        self.logits.append(logits[0])
        self.lengths.append(self.memory.layers[0].length)
        self.next.append(int(self.memory.next_position[0]))
        return super().__call__(logits, rows)


class Watched(Eviction):
    """Remembers at which forward it was asked to compress, and the positions that stayed."""

    def compress(self, rows: list[int], batch: int) -> list[int]:
        assert self._memory is not None
        shrunk = super().compress(rows, batch)
        self.rounds.append([layer.positions[0] for layer in self._memory.layers])
        return shrunk

    def begin(self, model: Any, memory: KVMemory) -> None:
        self.rounds: list[list[torch.Tensor]] = []
        super().begin(model, memory)


def model_of(folder: Path, family: str) -> Any:
    config = json.loads((folder / "e2e_index.json").read_text())[family]["config"]
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": config.pop("rope_theta")}
    config.pop("rope_scaling", None)
    kind = config.pop("model_type")
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **config), attn_implementation="sdpa").eval()
    model.load_state_dict(load_file(folder / f"e2e_{family}_weights.safetensors"))
    return model


def test_decoding(e2e: Path) -> None:
    """Fed with the reference's tokens: logits, lengths, positions, rounds and the memory at the end."""
    family, _, run = e2e.stem.removeprefix("e2e_").partition("_")
    tensors = load_file(e2e)
    about = json.loads((e2e.parent / "e2e_index.json").read_text())[family]["runs"][run]
    model = model_of(e2e.parent, family)
    memory = KVMemory(model)
    prompt = tensors["prompt"].long().reshape(1, -1)
    answer = tensors["sequences"].long().flatten()[prompt.shape[1] :]
    compressor = None
    if "method" in about:
        config = about["model_config"]
        newline = config["divide_method"] == "newline"
        trigger = NewlineIds(about["newline_token_ids"]) if newline else StepPhase(config["divide_length"])
        policy = policy_of(about["method_config"], about["method"])
        compressor = Watched(policy, about["method_config"]["budget"], trigger)
    replay = Replay(answer, memory)
    generate(
        model, prompt, memory=memory, compressor=compressor, sampler=replay, max_new_tokens=len(answer), eos_token_id=()
    )
    logits = torch.stack(replay.logits)
    torch.testing.assert_close(logits, tensors["logits"], rtol=0, atol=1e-5)
    assert torch.equal(logits.argmax(-1), tensors["logits"].argmax(-1))
    if (trace := tensors.get("trace")) is not None:
        assert replay.lengths == trace[: len(answer), 4].tolist()
        assert replay.next == (trace[: len(answer), 3] + 1).tolist()
    rounds = compressor.rounds if compressor is not None else []
    recorded = sorted({int(key.rsplit("round", 1)[1]) for key in tensors if key.startswith("kept.")})
    effective = [kept for kept in rounds if kept[0].shape[-1] == about["method_config"]["budget"]]
    for number in recorded:
        for layer, kept in enumerate(effective[number]):
            assert torch.equal(kept, tensors[f"kept.layer{layer}.round{number}"].long()), (number, layer)
    for layer, rows in enumerate(memory.layers):
        for name, found in (("key", rows.keys), ("value", rows.values)):
            if (expected := tensors.get(f"final_{name}.{layer}")) is not None:
                torch.testing.assert_close(found, expected.reshape(found.shape), rtol=0, atol=1e-5)


PRESSES = {
    "knorm": ("knorm", {"window": 1}),
    "keydiff": ("keydiff", {"window": 1}),
    "snapkv_w16_k5": ("snapkv_prefill", {"window": 16, "kernel_size": 5}),
    "pyramidkv_w8_beta4": ("snapkv_prefill", {"window": 8, "kernel_size": 5}),
    "tova": ("tova", {}),
    "tova_eager": ("tova", {}),
    "streaming_llm": ("streaming_llm", {"sinks": 4}),
    "observed_attention": ("h2o", {"average": True, "window": 1, "recent_ratio": 0.0}),
}
# These presses keep the window whatever its score; knorm, keydiff and observed attention do not.
WINDOWED = {"snapkv_w16_k5", "pyramidkv_w8_beta4", "tova", "tova_eager", "streaming_llm"}


@pytest.fixture(scope="module")
def prefill(reference: Path) -> tuple[Tensors, list[View]]:
    """What a prefill of the prompt leaves in every layer: keys, values, queries and received attention."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    folder = reference / "rkv"
    tensors = load_file(folder / "kvpress_presses_llama.safetensors")
    config = json.loads((folder / "e2e_index.json").read_text())["llama"]["config"]
    config.pop("model_type")
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": config.pop("rope_theta")}
    model = LlamaForCausalLM(LlamaConfig(**config, attn_implementation="eager")).eval()
    model.load_state_dict(load_file(folder / "e2e_llama_weights.safetensors"))
    queries = []

    def capture(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        flat = module.q_proj(kwargs["hidden_states"])
        heads = flat.unflatten(-1, (-1, module.head_dim)).transpose(1, 2)
        queries.append(apply_rotary_pos_emb(heads, heads, *kwargs["position_embeddings"])[0])

    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(capture, with_kwargs=True)
    with torch.no_grad():
        weights = model(tensors["prompt"], output_attentions=True).attentions
    views = []
    for number, (query, weight) in enumerate(zip(queries, weights, strict=True)):
        keys, values = tensors[f"full.layer{number}.keys"], tensors[f"full.layer{number}.values"]
        received = weight.sum(2).unflatten(1, (keys.shape[1], -1)).mean(2)
        views.append(View(keys, values, torch.arange(keys.shape[2]).expand(keys.shape[:3]), query, received))
    return tensors, views


@pytest.mark.parametrize("press", PRESSES)
def test_kvpress_scores(press: str, prefill: tuple[Tensors, list[View]]) -> None:
    tensors, views = prefill
    if f"{press}.layer0.score" not in tensors:
        pytest.skip(f"{press} is not in this reference")
    name, settings = PRESSES[press]
    policy = make_policy(name, **settings)
    for layer, view in enumerate(views):
        score, kept = tensors[f"{press}.layer{layer}.score"], tensors[f"{press}.layer{layer}.keys"]
        past = view.keys.shape[2] - policy.window
        if press != "streaming_llm":  # theirs is 1 for what stays and 0 for the rest
            torch.testing.assert_close(policy.score(view, past, layer), score[..., :past], rtol=1e-5, atol=1e-6)
        if press in WINDOWED:
            indices = policy.select(view, kept.shape[2])
            found = view.keys.gather(2, indices[..., None].expand_as(kept))
            distance = torch.cdist(found, kept, compute_mode="donot_use_mm_for_euclid_dist")
            assert float(distance.amin(-1).max()) <= 1e-5, f"layer {layer}: a key stays that they evict"
            assert float(distance.amin(-2).max()) <= 1e-5, f"layer {layer}: a key goes that they keep"
