"""The gist method: its loss, its answers, its arms, its weights on the way out and back."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cases
import pytest
import torch
from transformers import AutoModelForCausalLM

import kvc
from kvc.__main__ import main
from kvc.core.backbone import Backbone, Lora
from kvc.data.instructions import Instructions
from kvc.data.squad import Squad
from kvc.errors import UserError
from kvc.generation.decode import generate
from kvc.methods.gist import FixedGists, GistRatio, GistTokens
from kvc.methods.gist.scoring import summarize

SAMPLES = Path(__file__).parents[2] / "data" / "samples"


def method(tiny_folder: Any, train: Any = "lora", **settings: Any) -> GistTokens:
    lora = Lora(r=4, dropout=0.0) if train == "lora" else None
    made = GistTokens(Backbone(pretrained=str(tiny_folder), lora=lora), train=train, **settings)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in made.backbone.named_parameters():
        if ".lora_B." in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    return made.eval()


def batch_of(made: Any, rows: Any = range(4), split: Any = "test", data: Any = None) -> Any:
    data = data or Squad(counts=(4, 4, 4), facts=(2, 12))
    data.trainer = SimpleNamespace(lightning_module=made)
    data.setup("test")
    items = data.dataset(split)
    return data.collate(split)([items[0, row] for row in rows])


@pytest.mark.parametrize("train", ["lora", "all"])
@torch.no_grad()
def test_the_loss_without_gists_is_that_of_transformers(tiny_folder: Any, train: str) -> None:
    made = method(tiny_folder, train, count=FixedGists(0))
    batch = batch_of(made, split="train")
    output = made.step(batch)
    total, count = 0.0, 0
    for row in range(4):
        parts = [batch[f"{p}_ids"][row][batch[f"{p}_mask"][row]] for p in ("head", "context", "tail", "answer")]
        labels = torch.cat([torch.full_like(torch.cat(parts[:3]), -100), parts[3]])
        loss = made.backbone(input_ids=torch.cat(parts)[None], labels=labels[None]).loss
        total, count = total + float(loss) * len(parts[3]), count + len(parts[3])
    assert int(output.num_tokens) == count
    assert float(output.loss_sum) == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("settings", [{}, {"keep_head": True}, {"control": "neg_control"}, {"control": "pos_control"}])
@torch.no_grad()
def test_the_loss_is_that_of_answering_from_memory(tiny_folder: Any, settings: Any) -> None:
    """What training sees is what decoding does: the loss of each token, read one by one from the compressed memory."""
    made = method(tiny_folder, count=GistRatio(7), **settings)
    batch = batch_of(made, split="train")
    output = made.step(batch)
    total = 0.0
    for row in range(4):
        one = {key: value[row : row + 1] for key, value in batch.items()}
        tail, answer = (one[f"{part}_ids"][one[f"{part}_mask"]][None] for part in ("tail", "answer"))
        memory = made.reader.compress(sequence_of(made, one))
        logits = made.backbone(input_ids=tail, **memory.forward_kwargs(tail)).logits[:, -1]
        for token in answer[0]:
            total += float(torch.nn.functional.cross_entropy(logits, token[None]))
            logits = made.backbone(input_ids=token[None, None], past_key_values=memory, use_cache=True).logits[:, -1]
    assert float(output.loss_sum) == pytest.approx(total, rel=1e-4)


def sequence_of(made: Any, batch: Any) -> Any:
    from kvc.methods.gist.module import PROMPT
    from kvc.methods.gist.sequence import sequence

    return sequence(batch, made.count.counts(batch["context_mask"].sum(1)), PROMPT, left=True)


@torch.no_grad()
def test_answers_do_not_depend_on_the_batch(tiny_folder: Any) -> None:
    made = method(tiny_folder, count=GistRatio(6), max_new_tokens=6)
    together = made.records(batch_of(made))
    for row, record in enumerate(together):
        (alone,) = made.records(batch_of(made, [row]))
        assert alone["arms"].keys() == record["arms"].keys()
        for arm, said in record["arms"].items():
            for key in ("completion", "new_tokens", "prompt_tokens", "em", "f1", "kv_tokens_peak"):
                assert said[key] == alone["arms"][arm][key], (arm, key)
        assert record["gists"] == -(-record["context_tokens"] // 6)
        assert {k: alone[k] for k in ("id", "gold", "gists")} == {k: record[k] for k in ("id", "gold", "gists")}


@pytest.mark.parametrize("train", ["lora", "all"])
@torch.no_grad()
def test_arms_are_what_they_say(tiny_folder: Any, train: str) -> None:
    made = method(tiny_folder, train, max_new_tokens=5)
    if train == "all":
        for parameter in made.backbone.parameters():
            parameter.data = parameter.data * 1.3
    batch = batch_of(made, [1])
    (record,) = made.records(batch)
    assert list(record["arms"]) == ["method", "trained_full", "trained_no_context", "full", "no_context"]
    plain = AutoModelForCausalLM.from_pretrained(tiny_folder).eval()
    question = batch["questions"][0]
    for model, start in ((plain, ""), (made.backbone, "trained_")):
        for arm, prompt in (("full", question.prompt), ("no_context", question.bare_prompt)):
            ids = torch.tensor([[1, *made.tokenizer(prompt, add_special_tokens=False)["input_ids"]]])
            new = model.generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=2, pad_token_id=0)
            text = made.tokenizer.decode(new[0, ids.shape[1] :], skip_special_tokens=True)
            assert record["arms"][start + arm]["completion"] == text
    assert record["arms"]["method"]["kv_tokens_peak"] < record["arms"]["full"]["kv_tokens_peak"]
    made.base_arms = False
    assert list(made.records(batch)[0]["arms"]) == ["method", "trained_full", "trained_no_context"]
    assert not [name for name in made.state_dict() if "_copy" in name]


def test_the_method_with_a_positive_control_answers_as_the_full_text_with_more_tokens(tiny_folder: Any) -> None:
    made = method(tiny_folder, count=FixedGists(0), max_new_tokens=6)
    for record in made.records(batch_of(made)):
        assert record["arms"]["method"]["completion"] == record["arms"]["trained_full"]["completion"]
    with pytest.raises(UserError, match=r"model\.keep_head: has no effect with the positive control"):
        method(tiny_folder, control="pos_control", keep_head=True)


def test_trained_are_the_token_and_what_is_asked_for(tiny_folder: Any) -> None:
    assert set(method(tiny_folder).groups()) == {"gist", "lora"}
    whole = method(tiny_folder, "all")
    assert set(whole.groups()) == {"gist", "embeddings", "model"}
    assert all(parameter.requires_grad for parameter in whole.parameters())
    with pytest.raises(UserError, match=r"'lora' needs backbone\.lora"):
        GistTokens(Backbone(pretrained=str(tiny_folder)), train="lora")


@pytest.mark.parametrize("train", ["lora", "all"])
def test_a_run_leaves_and_comes_back(tiny_folder: Path, tmp_path: Path, train: str) -> None:
    config = cases.gist_config(tiny_folder)
    config["trainer"]["max_epochs"] = 1
    if train == "all":
        config["model"]["init_args"] |= {"backbone": {"pretrained": str(tiny_folder)}, "train": "all"}
    assert cases.fit(config, tmp_path / "run") == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert {"em", "f1", "ratio", "distinct", "collapsed", "kv_tokens_peak"} <= result["metrics"].keys()
    assert {"full", "no_context", "trained_full", "trained_no_context"} == result["arms"].keys()
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    ours, back = kvc.load(tmp_path / "run"), kvc.load(tmp_path / "out")
    assert not torch.equal(ours.gist.vector, method(tiny_folder).gist.vector)
    texts = ["Tom lives in Oslo. Ann is 30 years old.", "The bell is red."]
    question = torch.tensor([ours.tokenizer("\nQuestion: Who?\nAnswer:", add_special_tokens=False)["input_ids"]] * 2)
    said = []
    for made in (ours, back):
        memory = made.compress(texts, head="Passage:")
        assert memory.tokens.tolist() == [int(-(-len(ids) // 8)) for ids in made.tokenizer(texts)["input_ids"]]
        said.append(generate(made.backbone, question, memory=memory.fork(), max_new_tokens=4).tokens)
    assert said[0] == said[1]
    assert back.compress(["", texts[1]]).tokens.tolist() == [1, float(memory.tokens[1])]
    with pytest.raises(UserError, match="call eval"):
        ours.train().compress(texts)


@torch.no_grad()
def test_instructions_are_graded_by_rouge(tiny_folder: Any) -> None:
    made = method(tiny_folder, max_new_tokens=4)
    path = str(SAMPLES / "instructions.jsonl")
    data = Instructions(path, {"seen": path, "unseen": path}, split=(1, 0, 0))
    records = made.records(batch_of(made, range(8), data=data))
    summary = summarize(records, 1).as_dict()
    assert {"rouge1", "rouge2", "rouge_l", "rouge_l/seen", "rouge_l/unseen"} <= summary["metrics"].keys()
    assert summary["differences"]["rouge_l"].keys() == {"trained_full", "trained_no_context", "full", "no_context"}


def test_summary() -> None:
    def said(answer: str, em: bool) -> dict[str, Any]:
        return {"answer": answer, "em": em, "f1": float(em), "kv_tokens_peak": 4.0, "read_seconds": 0.1}

    rows = [(True, True, False), (False, True, False), (True, True, True), (False, True, False)]
    records = [
        {
            "group": "a",
            "gold": str(number),
            "context_tokens": 10 * (number + 1),
            "gists": 5,
            "arms": {
                "method": said("x", ours),
                "trained_full": said(str(number), full),
                "trained_no_context": said("y", none),
            },
        }
        for number, (ours, full, none) in enumerate(rows)
    ]
    found = summarize(records, 3)
    assert found.metrics["em"].value == 0.5
    assert found.metrics["em_normalised"].value == pytest.approx((0.5 - 0.25) / (1 - 0.25))
    assert found.differences["em"]["trained_full"].value == -0.5
    assert (found.metrics["ratio"].value, found.metrics["ratio_mean"].value) == (5.0, 5.0)
    assert found.metrics["collapsed"].value == 1
    assert "em/a" not in found.metrics


def test_a_whole_prompt_leaves_nothing_to_answer_from(tiny_folder: Any) -> None:
    made = method(tiny_folder)
    with pytest.raises(UserError, match=r"data\.scope: nothing stands behind the gist tokens"):
        made.step(batch_of(made, split="train", data=Squad(counts=(4, 4, 4), scope="prompt")))
