"""The CCM method: its loss is what step-by-step inference sees, and its evaluation counts rows and hits rightly."""

from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from kvc.cache.accounting import storage_bytes
from kvc.core.backbone import Backbone, Lora
from kvc.errors import UserError
from kvc.methods.ccm import CompressedContextMemory
from kvc.methods.ccm.distillation import Distillation
from kvc.methods.ccm.insertion import insert_runs
from kvc.methods.ccm.merging import Ema
from kvc.methods.ccm.recurrent import CompressedMemory
from kvc.methods.ccm.scoring import METHOD, UNTRAINED, rows_held

PROMPTS = [[1, 40, 41, 42], [1, 50]]
SEGMENTS = [[[60, 61, 62], [63, 64], [65, 66, 67]], [[70, 71, 72, 73], [74, 75]]]


def method(tiny_folder: Any, **settings: Any) -> CompressedContextMemory:
    backbone = Backbone(pretrained=str(tiny_folder), lora=Lora(r=4, dropout=0.0))
    made = CompressedContextMemory(backbone, **settings)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in made.backbone.named_parameters():
        if ".lora_B." in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    return made


def batch(rows: list[int], width: int = 13) -> dict[str, torch.Tensor]:
    """Right-padded; padding holds ordinary ids, so that a leak shows."""
    made = {name: torch.zeros(len(rows), width, dtype=torch.bool) for name in ("attention_mask", "prompt", "cut")}
    ids, labels = torch.full((len(rows), width), 77), torch.full((len(rows), width), -100)
    for line, row in enumerate(rows):
        whole = PROMPTS[row] + [token for segment in SEGMENTS[row] for token in segment]
        size, prompt = len(whole), len(PROMPTS[row])
        ids[line, :size] = torch.tensor(whole)
        labels[line, prompt:size] = ids[line, prompt:size]
        made["attention_mask"][line, :size] = True
        made["prompt"][line, :prompt] = True
        ends = torch.tensor([prompt - 1] + [len(segment) for segment in SEGMENTS[row]]).cumsum(0)[1:-1]
        made["cut"][line, ends] = True
    mask = made.pop("attention_mask").long()
    return {"id": torch.tensor(rows), "input_ids": ids, "labels": labels, "attention_mask": mask, **made}


@torch.no_grad()
def stepwise(made: CompressedContextMemory, row: int) -> tuple[list[float], list[bool]]:
    """Loss of every token of the solution, and hits of the last segment, read chunk by chunk."""
    memory = CompressedMemory(made.compressor)
    prompt, segments = torch.tensor([PROMPTS[row]]), [torch.tensor([segment]) for segment in SEGMENTS[row]]
    if made.sink:
        memory.keep(prompt[:, :1])
        prompt = prompt[:, 1:]
    if made.keep_prompt:
        memory.keep(prompt)
        before = made.compressor.logits(made.compressor.hidden(prompt, torch.ones_like(prompt)).last_hidden_state)
        following = before[0, -1]
    else:
        segments[0] = torch.cat([prompt, segments[0]], dim=1)
        following = None
    losses: list[float] = []
    hits: list[bool] = []
    for segment in segments:
        logits = memory.logits(segment)[0]
        predicted = logits[:-1] if following is None else torch.cat([following[None], logits[:-1]])
        targets = segment[0, 1:] if following is None else segment[0]
        losses += cross_entropy(predicted, targets, reduction="none").tolist()
        hits = (predicted.argmax(-1) == targets).tolist()
        following = logits[-1]
        memory.compress(segment)
    if not made.keep_prompt:
        losses = losses[prompt.shape[1] - 1 :]
    return losses, hits


@pytest.mark.parametrize("kind", ["concat_recur", "merge_recur", "concat", "merge"])
@pytest.mark.parametrize("kept", ["prompt", "sink", "nothing"])
@torch.no_grad()
def test_the_loss_is_that_of_reading_step_by_step(tiny_folder: Any, kind: Any, kept: str) -> None:
    made = method(tiny_folder, kind=kind, slots=2, keep_prompt=kept == "prompt", sink=kept == "sink").eval()
    expected = [stepwise(made, row) for row in (0, 1)]
    output = made.step(batch([0, 1]))
    if kind in {"concat", "merge"}:
        expected = [(loss[-len(hits) + 1 :], hits[1:]) for loss, hits in expected]
    losses = [loss for row, _ in expected for loss in row]
    assert int(output.num_tokens) == len(losses)
    assert float(output.loss_sum) == pytest.approx(sum(losses), rel=1e-4)
    for record, (loss, hits) in zip(made.records(batch([0, 1])), expected):
        ours = record["arms"][METHOD]
        assert (ours["right"], ours["tokens"], ours["exact"]) == (sum(hits), len(hits), all(hits))
        assert ours["nll"] == pytest.approx(sum(loss[-len(hits) :]), rel=1e-4)


@pytest.mark.parametrize("kind", ["concat_recur", "merge", "full", "no_context", "gist"])
@torch.no_grad()
def test_a_padded_batch_gives_what_its_rows_give(tiny_folder: Any, kind: Any) -> None:
    made = method(tiny_folder, kind=kind, cond_lora=kind not in {"full", "no_context"}).eval()
    padded = batch([0, 1], width=17)
    padded["cut"][~padded["attention_mask"].bool()] = True
    together = made.step(padded)
    alone = [made.step(batch([row], width=12 if row == 0 else 8)) for row in (0, 1)]
    assert float(together.loss_sum) == pytest.approx(sum(float(output.loss_sum) for output in alone), rel=1e-5)
    both = made.records(padded)
    for row, record in enumerate(both):
        (one,) = made.records(batch([row]))
        assert record["id"] == one["id"]
        for arm, scores in record["arms"].items():
            assert scores == pytest.approx(one["arms"][arm], rel=1e-4)


@pytest.mark.parametrize("cond_lora", [True, False])
@torch.no_grad()
def test_arms_are_the_base_model(tiny_folder: Any, cond_lora: bool) -> None:
    """Full: the plain model on the plain text. No context: prompt and last segment at their own positions."""
    made = method(tiny_folder, slots=2, cond_lora=cond_lora).eval()
    base = Backbone(pretrained=str(tiny_folder)).load().eval()
    for row, record in enumerate(made.records(batch([0, 1]))):
        whole = torch.tensor([PROMPTS[row] + [token for segment in SEGMENTS[row] for token in segment]])
        last, prompt = len(SEGMENTS[row][-1]), len(PROMPTS[row])
        logits = base(whole).logits[0]
        full = cross_entropy(logits[-last - 1 : -1], whole[0, -last:], reduction="sum")
        assert record["arms"]["full"]["nll"] == pytest.approx(float(full), rel=1e-4)
        size = whole.shape[1]

        def seen(start: int, stop: int, whole: Any = whole, prompt: int = prompt) -> torch.Tensor:
            """Logits of prompt and tokens `start` to `stop`, at their own positions."""
            places = [*range(prompt), *range(start, stop)]
            return base(whole[:, places], position_ids=torch.tensor([places])).logits[0]

        first = seen(size - last - len(SEGMENTS[row][-2]), size - last)[-1]
        logits = torch.cat([first[None], seen(size - last, size)[-last:-1]])
        alone = cross_entropy(logits, whole[0, -last:], reduction="sum")
        assert record["arms"]["no_context"]["nll"] == pytest.approx(float(alone), rel=1e-4)


@pytest.mark.parametrize("kind", ["concat_recur", "merge_recur", "gist"])
@torch.no_grad()
def test_the_untrained_arm_is_the_method_before_training(tiny_folder: Any, kind: Any) -> None:
    before = CompressedContextMemory(Backbone(pretrained=str(tiny_folder), lora=Lora(r=4)), kind=kind, slots=2).eval()
    after = method(tiny_folder, kind=kind, slots=2).eval()
    after.tokens.table.data += 1.0
    for first, second in zip(before.records(batch([0, 1])), after.records(batch([0, 1]))):
        expected = first["arms"][METHOD]
        assert second["arms"][UNTRAINED] == pytest.approx(expected, rel=1e-4)
        assert second["arms"][METHOD]["nll"] != pytest.approx(expected["nll"], rel=1e-3)
    assert UNTRAINED not in method(tiny_folder, kind="full", cond_lora=False).eval().records(batch([0]))[0]["arms"]


@pytest.mark.parametrize(("kind", "cond_lora"), [("concat_recur", True), ("concat_recur", False), ("merge", True)])
def test_the_teacher_is_the_base_model_with_everything_in_sight(tiny_folder: Any, kind: Any, cond_lora: bool) -> None:
    weight, heat = 0.3, 2.0
    made = method(tiny_folder, kind=kind, slots=2, cond_lora=cond_lora, distillation=Distillation(weight, heat))
    made.eval()
    plain = made.step(batch([0, 1]))
    # The adapters have no dropout, so train mode changes the loss alone.
    made.train()
    output = made.step(batch([0, 1]))
    assert made.backbone.training
    base = Backbone(pretrained=str(tiny_folder)).load().eval()
    divergence = 0.0
    for row in (0, 1):
        whole = torch.tensor([PROMPTS[row] + [token for segment in SEGMENTS[row] for token in segment]])
        one = batch([row], width=whole.shape[1])
        chosen = made._targets(one, last=kind == "merge")[0]
        with torch.no_grad():
            teacher = (base(whole).logits[0, :-1][chosen] / heat).softmax(-1)
            student = (made.compressor.logits(made._read(made.compressor, one)[0, :-1][chosen]) / heat).softmax(-1)
        divergence += float((teacher * (teacher.log() - student.log())).sum())
    expected = (1 - weight) * float(plain.loss_sum) + weight * heat**2 * divergence
    assert float(output.loss_sum) == pytest.approx(expected, rel=1e-4)
    assert divergence > 0.01
    assert float(output.metrics["cross_entropy"]) == pytest.approx(float(plain.loss_sum / plain.num_tokens), rel=1e-5)
    output.loss_sum.backward()
    assert made.tokens.table.grad is not None
    assert made.tokens.table.grad.any()


def test_only_memory_tokens_and_lora_train(tiny_folder: Any) -> None:
    made = method(tiny_folder, slots=2).train()
    made.step(batch([0, 1])).loss_sum.backward()
    trained = {name for name, p in made.named_parameters() if p.requires_grad}
    assert all(name == "tokens.table" or ".lora_" in name for name in trained)
    # Nothing reads the output of memory tokens in the last layer, only their keys and values.
    idle = {name for name in trained if ".layers.1." in name and (".q_proj." in name or ".o_proj." in name)}
    for name, parameter in made.named_parameters():
        if name in trained:
            assert parameter.grad is not None
            assert parameter.grad.any() == (name not in idle), name
    assert set(made.groups()) == {"embeddings", "lora"}
    assert set(made.trained_state()) == trained
    control = method(tiny_folder, kind="full", cond_lora=False)
    assert set(control.groups()) == {"lora"}


@pytest.mark.parametrize("distillation", [None, Distillation()])
def test_checkpointing_gives_the_same_gradients(tiny_folder: Any, distillation: Any) -> None:
    found = []
    for checkpointing in (False, True):
        made = method(tiny_folder, kind="merge_recur", slots=2, distillation=distillation).train()
        if checkpointing:
            made.backbone.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        # An evaluation between forward and backward must not change what is recomputed.
        loss = made.step(batch([0, 1])).loss_sum
        made.records(batch([1]))
        loss.backward()
        found.append({name: p.grad for name, p in made.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("left", [True, False])
def test_runs_are_inserted_after_cuts(left: bool) -> None:
    rows = [[5, 6, 7, 8, 9], [5, 6]]
    cuts = [[0, 1, 0, 1, 0], [1, 0]]
    gap = [0] * 3
    ids = torch.tensor([rows[0], gap + rows[1] if left else rows[1] + gap])
    # Flags of padding mean nothing.
    noise = [1, 1, 1]
    cut = torch.tensor([cuts[0], noise + cuts[1] if left else cuts[1] + noise]).bool()
    mask = torch.tensor([[1] * 5, [0, 0, 0, 1, 1] if left else [1, 1, 0, 0, 0]])
    found = insert_runs(ids, mask, cut, 100, 2)
    lines = [line[real.bool()].tolist() for line, real in zip(found.input_ids, found.attention_mask)]
    assert lines == [[5, 6, 100, 101, 7, 8, 100, 101, 9], [5, 100, 101, 6]]
    assert torch.equal(found.input_ids.gather(1, found.place)[mask.bool()], ids[mask.bool()])
    assert torch.equal(found.moved(mask.bool()), found.attention_mask.bool() & (found.input_ids < 100))


@pytest.mark.parametrize(
    ("kind", "peak", "final", "share"),
    [
        ("full", 19, 19, 1.0),
        ("no_context", 12, 9, 0.0),
        ("concat_recur", 14, 13, 0.4),
        ("merge_recur", 14, 11, 0.2),
        ("concat", 14, 13, 0.4),
    ],
)
def test_rows_held(kind: Any, peak: float, final: float, share: float) -> None:
    """Prompt of 5; segments of 3 and 7 tokens; 4 at the end; two memory tokens."""
    held = rows_held(kind, 5, [7, 3, 4], 2, 100.0)
    tokens = {"kv_tokens_peak": peak, "kv_tokens_final": final}
    expected = {**tokens, "kv_bytes_peak": 100.0 * peak, "kv_bytes_final": 100.0 * final, "kv_share": share}
    assert held == expected


@pytest.mark.parametrize("kind", ["concat_recur", "merge_recur"])
@pytest.mark.parametrize("kept", ["prompt", "sink", "nothing"])
@torch.no_grad()
def test_rows_and_bytes_are_those_that_reading_holds(tiny_folder: Any, kind: Any, kept: str) -> None:
    made = method(tiny_folder, kind=kind, slots=2, keep_prompt=kept == "prompt", sink=kept == "sink").eval()
    for row, record in enumerate(made.records(batch([0, 1]))):
        memory = CompressedMemory(made.compressor)
        stays = {"prompt": len(PROMPTS[row]), "sink": 1, "nothing": 0}[kept]
        if stays:
            memory.keep(torch.tensor([PROMPTS[row][:stays]]))
        first, *others = SEGMENTS[row][:-1]
        for segment in (PROMPTS[row][stays:] + first, *others):
            memory.compress(torch.tensor([segment]))
        last = torch.tensor([SEGMENTS[row][-1]])
        positions = memory.memory.next_position[:, None] + torch.arange(last.shape[1])
        made.backbone(last, position_ids=positions, past_key_values=memory.memory)
        ours = record["arms"][METHOD]
        assert ours["kv_tokens_final"] == float(memory.memory.tokens)
        assert ours["kv_tokens_peak"] == max(float(memory.peak), float(memory.memory.tokens))
        held = storage_bytes(tensor for layer in memory.memory.layers for tensor in (layer.keys, layer.values))
        assert ours["kv_bytes_final"] == held
        runs = 1 if kind == "merge_recur" else len(SEGMENTS[row]) - 1
        text = len(PROMPTS[row]) - stays + sum(map(len, SEGMENTS[row][:-1]))
        assert ours["kv_share"] == pytest.approx(2 * runs / text)


def test_settings_without_effect_are_refused(tiny_folder: Any) -> None:
    with pytest.raises(ValueError, match=r"distillation.weight must be above 0"):
        Distillation(weight=0)
    with pytest.raises(ValueError, match=r"distillation.temperature must be positive"):
        Distillation(temperature=0)
    with pytest.raises(UserError, match=r"model.backbone.lora: CCM trains a LoRA"):
        CompressedContextMemory(Backbone(pretrained=str(tiny_folder)))
    with pytest.raises(UserError, match=r"model.kind: 'full' has no memory tokens"):
        method(tiny_folder, kind="full")
    with pytest.raises(UserError, match=r"model.merge: has no effect with the kind 'concat'"):
        method(tiny_folder, kind="concat", merge=Ema())
    with pytest.raises(UserError, match=r"model.sink: has no effect with keep_prompt"):
        method(tiny_folder, sink=True)


def test_memory_tokens_are_no_labels(tiny_folder: Any) -> None:
    made, wrong = method(tiny_folder, slots=2), batch([0, 1])
    wrong["labels"][1, 3] = made.tokens.vocabulary + 1
    with pytest.raises(UserError, match="labels: row 1 asks for a memory token at token 3"):
        made.step(wrong)
    with pytest.raises(UserError, match="labels: row 1 asks for a memory token at token 3"):
        made.records(wrong)


@pytest.mark.parametrize("family", ["mamba", "bloom"])
def test_models_without_standard_attention_are_refused(family: str, tiny_folder: Any, tmp_path: Any) -> None:
    config = AutoConfig.for_model(family, vocab_size=1536, hidden_size=16, num_hidden_layers=2, n_layer=2, n_head=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(tmp_path)
    targets = {"mamba": "in_proj", "bloom": "query_key_value"}[family]
    backbone = Backbone(pretrained=str(tmp_path), lora=Lora(r=2, targets=[targets]), attn_implementation="eager")
    with pytest.raises(UserError, match=r"backbone.pretrained: .*ForCausalLM has no standard attention in each layer"):
        CompressedContextMemory(backbone)
