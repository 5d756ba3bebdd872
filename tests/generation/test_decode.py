"""The decode loop without compression is `model.generate`, whatever the batch; rows leave it when they end."""

from typing import Any

import pytest
import torch
from transformers import TextIteratorStreamer
from transformers.generation.streamers import BaseStreamer

from kvc.cache.memory import KVMemory
from kvc.core.backbone import Backbone
from kvc.errors import UserError
from kvc.generation.decode import generate
from kvc.generation.sampling import Forced, Greedy, Sampling
from kvc.generation.stopping import StopStrings
from tests.cache.kv_models import FAMILIES, left_padded, tiny, tokens

# A model whose key positions change with the length of the text cannot be continued exactly by anybody.
EXACT = [family for family in FAMILIES if family != "dynamic"]


def plain(
    model: Any, ids: torch.Tensor, mask: torch.Tensor | None, new: int, eos: int | None = None
) -> list[list[int]]:
    # Without a mask, generate would take pad tokens within the text for padding.
    mask = torch.ones_like(ids) if mask is None else mask
    out = model.generate(
        ids, attention_mask=mask, do_sample=False, max_new_tokens=new, eos_token_id=None, pad_token_id=0
    )
    return out[:, ids.shape[1] :].tolist()


@pytest.mark.parametrize("family", EXACT)
def test_without_a_compressor_it_is_the_plain_model(family: str) -> None:
    model = tiny(family)
    ids, mask = left_padded([tokens(9), tokens(4, seed=1), tokens(13, seed=2)])
    output = generate(model, ids, mask, max_new_tokens=20, eos_token_id=())
    assert output.tokens == plain(model, ids, mask, 20)
    assert output.finish == ["length"] * 3
    assert output.prompt_tokens == [9, 4, 13]
    assert output.compressions == [0, 0, 0]


def test_rows_end_at_different_times_and_leave_the_memory() -> None:
    model = tiny("llama")
    rows = [tokens(5 + n, seed=n) for n in range(6)]
    ids, mask = left_padded(rows)
    long = plain(model, ids, mask, 30)
    end = long[2][7]
    output = generate(model, ids, mask, max_new_tokens=30, eos_token_id=end)
    for row, alone in enumerate(long):
        length = alone.index(end) + 1 if end in alone else 30
        assert output.tokens[row] == alone[:length]
        assert output.finish[row] == ("eos" if end in alone else "length")
        # The last token is never read again.
        assert output.usage.summary(row)["kv_tokens_final"] == len(rows[row]) + length - 1
    assert len({len(row) for row in output.tokens}) > 2
    going = [row for row in range(6) if len(output.tokens[row]) == max(map(len, output.tokens))]
    assert output.memory.layers[0].batch_size == len(going)


def test_a_memory_is_continued() -> None:
    model = tiny("qwen2")
    first, second = tokens(2, 7), tokens(2, 5, seed=3)
    memory = KVMemory(model)
    answer = generate(model, first, max_new_tokens=6, memory=memory, eos_token_id=())
    turn = torch.cat([torch.tensor(answer.tokens)[:, -1:], second], dim=1)
    continued = generate(model, turn, max_new_tokens=6, memory=memory, eos_token_id=())
    whole = torch.cat([first, torch.tensor(answer.tokens), second], dim=1)
    assert continued.tokens == plain(model, whole, None, 6)
    assert continued.memory is memory


def test_samples_of_one_prompt_are_those_of_its_copies() -> None:
    model = tiny("llama")
    ids, mask = left_padded([tokens(9), tokens(4, seed=1)])
    once = generate(
        model, ids, mask, max_new_tokens=8, samples=3, sampler=Sampling(temperature=1.5, top_p=1.0), eos_token_id=()
    )
    copies = generate(
        model,
        ids.repeat_interleave(3, dim=0),
        mask.repeat_interleave(3, dim=0),
        max_new_tokens=8,
        sampler=Sampling(temperature=1.5, top_p=1.0),
        eos_token_id=(),
    )
    assert once.tokens == copies.tokens
    assert len({tuple(row) for row in once.tokens}) == 6
    assert once.prompt_tokens == [9, 9, 9, 4, 4, 4]


def test_a_stop_string_ends_a_row_and_is_cut_from_its_text() -> None:
    backbone = Backbone()
    model, tokenizer = backbone.load().eval(), backbone.load_tokenizer()
    text = " Ida has 5 keys.\n#### 5\nQuestion"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    prompt = torch.tensor([tokenizer("Keys ####", add_special_tokens=False)["input_ids"]])
    output = generate(
        model,
        prompt,
        max_new_tokens=len(ids),
        sampler=Forced([ids]),
        stop=StopStrings(["\n####"], tokenizer),
        tokenizer=tokenizer,
        eos_token_id=(),
    )
    assert output.finish == ["stop"]
    assert output.texts == [" Ida has 5 keys."]


class Collect(BaseStreamer):
    def __init__(self) -> None:
        self.seen: list[int] = []
        self.ended = 0

    def put(self, value: torch.Tensor) -> None:
        self.seen += value.flatten().tolist()

    def end(self) -> None:
        self.ended += 1


def test_streaming() -> None:
    model, ids = tiny("llama"), tokens(1, 6)
    collect = Collect()
    output = generate(model, ids, max_new_tokens=9, streamer=collect, eos_token_id=())
    assert collect.seen == [*ids[0].tolist(), *output.tokens[0]]
    assert collect.ended == 1
    backbone = Backbone()
    tokenizer = backbone.load_tokenizer()
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    prompt = torch.tensor([tokenizer("Question: Ida")["input_ids"]])
    answer = generate(backbone.load().eval(), prompt, max_new_tokens=5, streamer=streamer, tokenizer=tokenizer)
    assert "".join(streamer) == tokenizer.decode(answer.tokens[0])


class Broken(Greedy):
    def __call__(self, logits: torch.Tensor, rows: Any) -> torch.Tensor:
        raise RuntimeError("no token today")


def test_a_failure_ends_the_stream() -> None:
    collect = Collect()
    with pytest.raises(RuntimeError, match="no token today"):
        generate(tiny("llama"), tokens(1, 6), max_new_tokens=9, streamer=collect, sampler=Broken())
    assert collect.ended == 1


def test_bad_arguments() -> None:
    model, ids = tiny("llama"), tokens(2, 6)
    mask = torch.tensor([[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]])
    with pytest.raises(UserError, match="padded on the left"):
        generate(model, ids, mask, max_new_tokens=3)
    with pytest.raises(UserError, match="max_new_tokens: must be at least 1"):
        generate(model, ids, max_new_tokens=0)
    with pytest.raises(UserError, match="samples: must be at least 1"):
        generate(model, ids, max_new_tokens=1, samples=0)
    with pytest.raises(UserError, match="one row can be streamed"):
        generate(model, ids, max_new_tokens=1, streamer=Collect())
    model.train()
    try:
        with pytest.raises(UserError, match="eval"):
            generate(model, ids, max_new_tokens=1)
    finally:
        model.eval()
