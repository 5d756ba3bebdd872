"""The COMP classifier: labels, sampling, hidden states."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cases
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kvc.core.backbone import Backbone
from kvc.data.comp import CompTraces, label_trace
from kvc.data.traces import Trace, strip_markers, synthetic_traces
from kvc.methods.comp import CompClassifier
from kvc.methods.comp import store as store_module
from kvc.methods.comp.head import CompHead
from kvc.methods.comp.states import reasoning_states
from kvc.methods.comp.store import build_store


def test_head_has_the_size_of_the_paper() -> None:
    with torch.device("meta"):
        head = CompHead(4096)
    assert sum(p.numel() for p in head.parameters()) == 16_785_409
    assert head.train()(torch.empty(3, 4096, device="meta")).shape == (3,)


# ---------------------------------------------------------------------- labels


@pytest.fixture(scope="module")
def merging() -> Any:
    """A byte-level BPE in which a full stop and the empty line after it are one token."""
    bpe = Tokenizer(models.BPE())
    # Not split at line breaks, so that merges across them exist.
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ", "merged_with_next"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    stop, line = ".", "Ċ"
    vocabulary = {token: number for number, token in enumerate(sorted(alphabet))}
    vocabulary |= {line + line: len(vocabulary), stop + line + line: len(vocabulary) + 1}
    bpe.model = models.BPE(vocab=vocabulary, merges=[(line, line), (stop, line + line)])
    return PreTrainedTokenizerFast(tokenizer_object=bpe)


def trace(marked: str) -> Trace:
    return Trace("How much?", marked, "12")


def test_marker_inside_a_merged_token_labels_that_token(merging: Any) -> None:
    item = label_trace(trace("1+2=3.<COMP>\n\n3*4=12.\n\n<COMP>So 12<COMP>\n#### 12"), 0, merging, "plain")
    assert item.text == "1+2=3.\n\n3*4=12.\n\nSo 12\n#### 12"
    marked = [item.text[:end] for end, label in zip(item.ends, item.labels) if label]
    # The last visible character before both first markers is a full stop that shares its token with the line breaks.
    assert marked == ["1+2=3.\n\n", "1+2=3.\n\n3*4=12.\n\n", "1+2=3.\n\n3*4=12.\n\nSo 12"]
    assert merging.convert_ids_to_tokens(item.ids)[5] == ".ĊĊ"


def test_tokens_are_those_of_the_text_without_markers(merging: Any, tiny_folder: Path) -> None:
    tiny = Backbone(str(tiny_folder)).load_tokenizer()
    marked = [t.reasoning_with_compression for t in synthetic_traces(30, 1, "train", (2, 6))]
    marked += ["1+2=3.<COMP>\n\n3*4=12. <COMP> So 12.\n<COMP>\n#### 12"]
    for tokenizer in (merging, tiny):
        for text in marked:
            item = label_trace(trace(text), 0, tokenizer, "plain")
            bare = label_trace(trace(strip_markers(text)[0]), 0, tokenizer, "plain")
            assert item.ids == bare.ids == tokenizer(item.text, add_special_tokens=False)["input_ids"]
            assert item.ends == bare.ends
            assert (item.newline, item.sentence) == (bare.newline, bare.sentence)
            assert sum(item.labels) == text.count("<COMP>")
            assert sum(bare.labels) == 0


def test_where_a_marker_stands_does_not_change_the_tokens(merging: Any) -> None:
    marks = ["1+2=3.<COMP> So 12.\n#### 12", "1+2=3. <COMP>So 12.\n#### 12", "1+2=3. So 12.<COMP>\n#### 12"]
    items = [label_trace(trace(text), 0, merging, "plain") for text in marks]
    assert items[0].ids == items[1].ids == items[2].ids
    assert items[0].labels == items[1].labels != items[2].labels


# ---------------------------------------------------------------------- data and sampling


def data_of(method: CompClassifier, batch: int = 4, counts: tuple[int, int, int] = (12, 4, 4)) -> CompTraces:
    data = CompTraces(counts=counts, steps=(2, 5), batch_size=batch)
    data.trainer = SimpleNamespace(lightning_module=method, world_size=1, global_rank=0, current_epoch=0)  # type: ignore[assignment]
    data.setup("fit")
    return data


@pytest.fixture(scope="module")
def method(tiny_folder: Path) -> CompClassifier:
    return CompClassifier(Backbone(str(tiny_folder)), cache=False, dropout=0.0)


@pytest.fixture(scope="module")
def data(method: CompClassifier) -> CompTraces:
    return data_of(method)


def batch_of(data: CompTraces, epoch: int, rows: list[int]) -> dict[str, torch.Tensor]:
    traces = data.dataset("train")
    batch: dict[str, torch.Tensor] = data.collate("train")([traces[epoch, row] for row in rows])
    return batch


def test_balanced_sampling_draws_as_many_distinct_negatives(method: CompClassifier, data: CompTraces) -> None:
    batch = batch_of(data, 0, [0, 1, 2, 3])
    chosen, labels = method.train().choose(batch), batch["labels"]
    assert (chosen & (labels == 1)).sum(-1).equal((labels == 1).sum(-1)), "every positive is in"
    assert (chosen & (labels == 0)).sum(-1).equal((labels == 1).sum(-1)), "as many negatives, in each trace"
    assert not (chosen & (labels < 0)).any()
    assert method.eval().choose(batch).equal(labels >= 0)


def test_draws_depend_on_seed_epoch_and_trace_alone(method: CompClassifier, data: CompTraces) -> None:
    method.train()
    here, alone = batch_of(data, 3, [5, 1, 2]), batch_of(data, 3, [1])
    length = int((alone["labels"] >= 0).sum())
    assert method.choose(here)[1, :length].equal(method.choose(alone)[0])
    chosen = [method.choose(batch_of(data, epoch, [1])) for epoch in (3, 3, 4)]
    assert chosen[0].equal(chosen[1])
    assert not chosen[0].equal(chosen[2])
    other = data_of(method)
    other.seed = 7
    assert not batch_of(other, 3, [1])["draw"].equal(alone["draw"])


@pytest.mark.parametrize("balance", ["weighted", "focal"])
def test_other_balances_take_every_token(
    method: CompClassifier, data: CompTraces, balance: Any, tiny_folder: Path
) -> None:
    other = CompClassifier(Backbone(str(tiny_folder)), balance=balance, cache=False)
    batch = batch_of(data, 0, [0, 1])
    assert other.train().choose(batch).equal(batch["labels"] >= 0)


# ---------------------------------------------------------------------- hidden states


def test_states_of_a_batch_are_those_of_each_row_alone(method: CompClassifier, data: CompTraces) -> None:
    items = data.labelled[:6]
    assert len({len(item.prompt_ids) + len(item.ids) for item in items}) > 1
    model = method.model()
    prompts, ids = [i.prompt_ids for i in items], [i.ids for i in items]
    together = reasoning_states(model, prompts, ids)
    small = reasoning_states(model, prompts, ids, budget=1)
    for item, states, alone in zip(items, together, small):
        assert states.shape == (len(item.ids), 32)
        assert torch.allclose(states, alone, atol=1e-5, rtol=0)
        row = torch.tensor([[*item.prompt_ids, *item.ids]])
        with torch.no_grad():
            full = model(row, output_hidden_states=True).hidden_states[-1][0, len(item.prompt_ids) :]
        assert torch.allclose(states, full, atol=1e-5, rtol=0)


def rows_of(lengths: list[int]) -> Any:
    states = torch.randn(sum(lengths), 8, generator=torch.Generator().manual_seed(3)).to(torch.bfloat16)
    starts = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    return states, lambda part: states[starts[part.start] : starts[part.stop]]


def test_store_of_several_shards_equals_one_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = [3, 1, 7, 2, 5, 4, 1]
    states, hidden = rows_of(lengths)
    one = build_store(tmp_path / "one", lengths, hidden)
    monkeypatch.setattr(store_module, "SHARD", 2)
    many = build_store(tmp_path / "many", lengths, hidden)
    assert len(list((tmp_path / "many").glob("*.safetensors"))) == 4
    assert len(one) == len(many) == sum(lengths)
    rows = torch.tensor([22, 0, 3, 3, 4, 10, 11, 21, 12, 13, 18])
    assert one.gather(rows).equal(states[rows])
    assert many.gather(rows).equal(states[rows])


def test_store_goes_on_where_it_was_killed_and_is_computed_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "SHARD", 2)
    lengths = [3, 1, 7, 2, 5]
    states, hidden = rows_of(lengths)
    asked: list[range] = []

    def failing(part: range) -> torch.Tensor:
        asked.append(part)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return hidden(part)

    with pytest.raises(KeyboardInterrupt):
        build_store(tmp_path / "store", lengths, failing)
    assert not (tmp_path / "store" / "index.json").exists()
    store = build_store(tmp_path / "store", lengths, failing)
    assert asked == [range(2), range(2, 4), range(4, 5), range(4, 5)]
    assert store.gather(torch.arange(18)).equal(states)
    build_store(tmp_path / "store", lengths, failing)
    assert len(asked) == 4


@pytest.mark.slow
def test_stored_states_train_like_recomputed_ones(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(store_module, "SHARD", 10)
    config = cases.comp_config(tiny_folder)
    assert cases.fit(config, tmp_path / "stored") == 0
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == 4
    config["model"]["init_args"]["cache"] = False
    assert cases.fit(config, tmp_path / "recomputed") == 0
    one, two = (cases.checkpoint(tmp_path / name)["state_dict"] for name in ("stored", "recomputed"))
    difference = cases.distance(one, two)
    print(f"stored and recomputed: largest difference {difference:.2e}")
    # States are kept in bf16 either way; padding moves a few across a rounding boundary.
    assert difference <= 2e-3


def test_head_stays_fp32_under_mixed_precision():
    head = CompHead(8, dropout=0.0)
    hidden = torch.randn(4, 8)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = head(hidden)
    assert mixed.dtype == torch.float32
    assert torch.equal(mixed, head(hidden))
