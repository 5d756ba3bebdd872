"""How well a model predicts each answer, with only part of what it read in sight.

The gold answer is given token by token (teacher forcing). The context is read once for all arms: its keys and values
are cached, and for each arm the tokens after it are read again with a 4-D attention mask.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache

from kvc.core.backbone import decoder, head_logits
from kvc.core.seeds import generator
from kvc.data.synthetic.example import Example, plain
from kvc.data.tokens import tokenize
from kvc.methods.lm.arms import ARMS, ORACLE_ARMS, Rule, View

PADDED_TOKENS = 4096  # of one batch: long rows go alone, without padding, where attention is fastest
COINS = 0xC0145  # keeps the draws of random eviction apart from others


class Row(NamedTuple):
    """One item, tokenised.

    Attributes:
        ids: All tokens, the first is BOS.
        context: Number of tokens up to and with the last one of the context.
        answer: For each token, whether it belongs to the answer.
        graded: For each token, whether it counts for exact match: numbers of a solution, else the answer itself.
        until: For each token, the index of the first token that no longer needs it; 0 where it is never needed.
        steps: For each step of a solution, the index after its last token.
    """

    ids: list[int]
    context: int
    answer: list[bool]
    graded: list[bool]
    until: list[int]
    steps: list[int]


class Score(NamedTuple):
    """What an arm got on one item.

    Attributes:
        exact: Every graded token is the most likely one.
        right: Number of graded tokens that are.
        graded: Number of graded tokens.
        steps_right: Steps whose graded tokens are all right.
        steps: Number of steps.
        nll: Sum of the negative log-likelihoods of all answer tokens, nats.
        tokens: Number of answer tokens.
        kept: Mean share of the earlier tokens that an answer token could see.
    """

    exact: bool
    right: int
    graded: int
    steps_right: int
    steps: int
    nll: float
    tokens: int
    kept: float


def encode(tokenizer: Any, example: Example) -> Row:
    """Tokenise the plain layout of an example whose single turn is graded."""
    document = plain(example)
    tokens = tokenize(tokenizer, document)
    start = len(example.prompt)
    ends = [0, *tokens.ends]

    def index(character: int) -> int:
        """Number of tokens that end at or before a character."""
        return bisect_right(ends, character)

    answer = [end > start for end in ends]
    hard = "result" if "result" in tokens.kinds else "answer"
    graded = [kind == hard and end > start for kind, end in zip(["context", *tokens.kinds], ends)]
    until = [0] * len(ends)
    for life in example.lifetimes:
        last = index(life.until)
        for token in range(index(life.start), index(life.end)):
            until[token] = max(until[token], last)
    context = index(len(example.context))
    return Row([tokenizer.bos_token_id, *tokens.ids], context, answer, graded, until, [index(s) for s in example.steps])


@torch.no_grad()
def score(
    model: Any, tokenizer: Any, examples: Sequence[Example], ids: Sequence[int], seed: int
) -> list[dict[str, Score]]:
    """Score every arm on every example; oracle arms only where all lifetimes are known.

    Args:
        model: Causal LM.
        tokenizer: Its tokenizer.
        examples: With one turn each.
        ids: A number for each example that, with the seed, draws what random eviction takes.
        seed: Seed of random eviction.
    """
    rows = [encode(tokenizer, example) for example in examples]
    results: list[dict[str, Score]] = [{} for _ in rows]
    device = model.device
    for batch in _batches(rows):
        part = [rows[i] for i in batch]
        view, layout = _view(part, [(seed, ids[i]) for i in batch], device)
        cache = _read_context(model, layout)
        arms = ARMS | (ORACLE_ARMS if all(examples[i].lifetimes for i in batch) else {})
        for name, rule in arms.items():
            for i, outcome in zip(batch, _score_arm(model, part, view, layout, cache, rule)):
                results[i][name] = outcome
    return results


def _batches(rows: Sequence[Row]) -> Iterator[list[int]]:
    """Indices of rows of similar length; oracle rows never share a batch with others because their tasks differ."""
    order = sorted(range(len(rows)), key=lambda i: (not any(rows[i].until), rows[i].context, len(rows[i].ids)))
    while order:
        count, width, known = 1, len(rows[order[0]].ids), any(rows[order[0]].until)
        while count < len(order):
            width = max(width, len(rows[order[count]].ids))
            if (count + 1) * width > PADDED_TOKENS or any(rows[order[count]].until) != known:
                break
            count += 1
        yield order[:count]
        order = order[count:]


class Layout(NamedTuple):
    """A batch with contexts padded on the left and what follows padded on the right, so that they meet in one column.

    Attributes:
        ids: `[B, T]` token ids.
        valid: `[B, T]` no padding.
        positions: `[B, T]` position of each token in its row.
        context: Number of columns of the context.
    """

    ids: Tensor
    valid: Tensor
    positions: Tensor
    context: int


def _view(rows: Sequence[Row], keys: Sequence[tuple[int, int]], device: torch.device) -> tuple[View, Layout]:
    before = max(row.context for row in rows)
    after = max(len(row.ids) - row.context for row in rows)
    total = before + after
    ids = torch.zeros(len(rows), total, dtype=torch.long)
    valid = torch.zeros(len(rows), total, dtype=torch.bool)
    sink = torch.zeros_like(valid)
    until = torch.zeros_like(ids)
    coin = torch.ones(len(rows), total)
    for number, row in enumerate(rows):
        start, stop = before - row.context, before - row.context + len(row.ids)
        ids[number, start:stop] = torch.tensor(row.ids)
        valid[number, start:stop] = True
        sink[number, start] = True
        until[number, start:stop] = torch.tensor(row.until) + start
        until[number, start:stop][torch.tensor(row.until) == 0] = 0
        coin[number, start:stop] = torch.rand(len(row.ids), generator=generator(COINS, *keys[number]))
    columns = torch.arange(total)
    context = valid & (columns < before)
    positions = (valid.cumsum(1) - 1).clamp(min=0)
    distance = columns[before:, None] - columns[None]
    seen = (distance >= 0) & valid[:, None]
    needed = columns[before:, None] < until[:, None]
    tensors = [tensor.to(device) for tensor in (distance, sink, context, coin, needed, seen)]
    layout = Layout(ids.to(device), valid.to(device), positions.to(device), before)
    return View(*tensors), layout


def _read_context(model: Any, layout: Layout) -> Any:
    """Keys and values of the context columns."""
    n = layout.context
    cache = DynamicCache(config=model.config)
    decoder(model)(
        input_ids=layout.ids[:, :n],
        attention_mask=layout.valid[:, :n].long(),
        position_ids=layout.positions[:, :n],
        past_key_values=cache,
        use_cache=True,
    )
    return cache


def _score_arm(model: Any, rows: Sequence[Row], view: View, layout: Layout, cache: Any, rule: Rule) -> list[Score]:
    n = layout.context
    visible = rule(view) & view.seen
    # A padded query sees itself, or its softmax would be over nothing.
    visible |= (view.distance == 0) & ~layout.valid[:, n:, None]
    hidden = decoder(model)(
        input_ids=layout.ids[:, n:],
        attention_mask=visible[:, None],
        position_ids=layout.positions[:, n:],
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state
    cache.crop(n - layout.ids.shape[1])
    logits = head_logits(model, hidden[:, :-1]).float()
    targets = layout.ids[:, n + 1 :]
    nll = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets).cpu()
    hit = (logits.argmax(-1) == targets).cpu()
    share = (visible.sum(-1) / view.seen.sum(-1).clamp(min=1)).cpu()
    return [_outcome(row, hit[i], nll[i], share[i]) for i, row in enumerate(rows)]


def _outcome(row: Row, hit: Tensor, nll: Tensor, share: Tensor) -> Score:
    """The score of one row from its predictions: entry j of each tensor is about token `row.context + 1 + j`."""
    first = row.context + 1
    count = len(row.ids) - first
    answer, graded = torch.tensor(row.answer[first:]), torch.tensor(row.graded[first:])
    hit, nll, share = hit[:count], nll[:count], share[:count]
    errors = [0, *(graded & ~hit).cumsum(0).tolist()]  # before each token, and after the last
    steps = [errors[max(end - first, 0)] for end in (0, *row.steps)]
    return Score(
        exact=errors[-1] == 0,
        right=int((graded & hit).sum()),
        graded=int(graded.sum()),
        steps_right=sum(before == after for before, after in pairwise(steps)),
        steps=len(row.steps),
        nll=float(nll[answer].sum()),
        tokens=int(answer.sum()),
        kept=float(share[answer].mean()),
    )
