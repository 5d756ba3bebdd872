"""CCM as a method: everything in one forward, loss on targets, scored against the full and no context."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch.nn import functional as F

from kvc.cache.accounting import cache_bytes
from kvc.core import seeds
from kvc.core.backbone import Backbone, Lora, decoder
from kvc.core.masks import Kind, is_merged
from kvc.core.method import Method, StepOutput
from kvc.core.module import Batch, Record
from kvc.core.optim import Optim
from kvc.core.results import Summary
from kvc.errors import UserError
from kvc.methods.ccm.distillation import Distillation
from kvc.methods.ccm.insertion import insert_runs
from kvc.methods.ccm.merging import MergeRule
from kvc.methods.ccm.parallel import Compressor
from kvc.methods.ccm.positions import Positions
from kvc.methods.ccm.scoring import METHOD, UNTRAINED, rows_held, summarize
from kvc.methods.ccm.tokens import MemoryTokens

PLAIN: tuple[Kind, ...] = ("full", "no_context")
"""Kinds without memory tokens."""
ISOLATED: tuple[Kind, ...] = ("concat", "merge")
"""Kinds whose finished segments see no memory: only the last segment is predicted."""


class CompressedContextMemory(Method):
    """Segments of a text become the keys and values of a few memory tokens (Kim et al. 2024, CCM).

    Trained are the embeddings of the memory tokens and a LoRA that acts on them alone. Batch: `input_ids`,
    `attention_mask`, `labels` `[B, T]`, `prompt` bool `[B, T]` and `cut` bool `[B, T]`, the last token of each segment
    that is compressed. A token after a run is predicted from the ordinary token before it, as in decoding. For `concat`
    and `merge`, in which that token sees no memory, the loss is on the last segment without its first token.

    Args:
        backbone: Base model; its `lora` is what is trained.
        kind: How segments are compressed and seen. `full` and `no_context` have no memory tokens: with `cond_lora:
            false`, `full` is the control that is tuned on the same data without compression.
        slots: Memory tokens of a run, n.
        positions: `skip`: memory tokens do not advance the positions of the text; `base`: every token counts.
        cond_lora: The LoRA acts on memory tokens only; false for an ordinary one on all tokens.
        keep_prompt: The prompt stays uncompressed; false compresses it with the first segment.
        sink: Without `keep_prompt`, keep the first token all the same.
        merge: How the merge kinds merge; the mean if null.
        distillation: Also learn from the base model with the full context, which costs a second forward; null for the
            text alone.
        optim: Optimiser; groups: lora, embeddings.
        seed: Seed of the run.
    """

    needs: ClassVar[tuple[str, ...]] = ("id", "input_ids", "attention_mask", "labels", "prompt", "cut")
    headline: ClassVar[tuple[str, ...]] = ("exact", "token_accuracy", "nll", "kv_share", "kv_tokens_peak")

    def __init__(
        self,
        backbone: Backbone | None = None,
        kind: Kind = "concat_recur",
        slots: int = 1,
        positions: Positions = "skip",
        cond_lora: bool = True,
        keep_prompt: bool = True,
        sink: bool = False,
        merge: MergeRule | None = None,
        distillation: Distillation | None = None,
        optim: Optim | None = None,
        seed: int = seeds.DEFAULT_SEED,
    ) -> None:
        super().__init__(optim or Optim(lr=3e-4, warmup=0.03), seed)
        self.base = backbone or Backbone(lora=Lora())
        if self.base.lora is None:
            raise UserError("model.backbone.lora: CCM trains a LoRA, give at least its rank, e.g. {r: 8}")
        if kind in PLAIN and cond_lora:
            raise UserError(f"model.kind: '{kind}' has no memory tokens, so a conditional LoRA would train nothing")
        if merge is not None and not is_merged(kind):
            raise UserError(f"model.merge: has no effect with the kind '{kind}'")
        if sink and keep_prompt:
            raise UserError("model.sink: has no effect with keep_prompt, which keeps the first token anyway")
        self.kind, self.slots, self.keep_prompt, self.sink = kind, slots, keep_prompt, sink
        self.distillation = distillation
        self.tokenizer = self.base.load_tokenizer()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.backbone = self.base.load()
        self.tokens = MemoryTokens(self.backbone.get_input_embeddings(), slots)
        self.tokens.requires_grad_(kind not in PLAIN)
        self.compressor = Compressor(self.backbone, self.tokens, kind, positions, cond_lora, merge)
        self._identity = self.base.identity(seed)

    def base_identity(self) -> dict[str, Any]:
        """Name and hash of the base model."""
        return {"name": self.base.pretrained, "hash": self._identity}

    def group_of(self, name: str) -> str:
        """`embeddings` for the memory tokens, `lora` for the rest."""
        return "embeddings" if name.startswith("tokens.") else "lora"

    def step(self, batch: Batch) -> StepOutput:
        """Negative log-likelihood of the labels, summed; in training with the distillation, if there is one."""
        chosen = self._targets(batch, last=self.kind in ISOLATED)
        teacher = self._taught(batch, chosen) if self.distillation is not None and self.training else None
        hidden = self._read(self.compressor, batch)
        logits = self.compressor.logits(hidden[:, :-1][chosen]).float()
        loss = F.cross_entropy(logits, batch["labels"][:, 1:][chosen], reduction="sum")
        if teacher is None or self.distillation is None:
            return StepOutput(loss, chosen.sum())
        metrics = {"cross_entropy": loss.detach() / chosen.sum().clamp(min=1)}
        return StepOutput(self.distillation.mixed(loss, logits, teacher), chosen.sum(), metrics)

    @torch.no_grad()
    def _taught(self, batch: Batch, chosen: torch.Tensor) -> torch.Tensor:
        """fp32 logits `[N, V]` of the base model with the full context, where tokens are predicted."""
        with self._base():
            hidden = self._read(self._plain("full"), batch)
            return self.compressor.logits(hidden[:, :-1][chosen]).float()

    def _plain(self, kind: Kind) -> Compressor:
        return Compressor(self.backbone, self.tokens, kind, "base", self.compressor.conditional)

    @cached_property
    def _untrained(self) -> Compressor:
        """The method as training found it: memory tokens with their first values."""
        ours = self.compressor
        tokens = MemoryTokens(self.backbone.get_input_embeddings(), self.slots).requires_grad_(False)
        return Compressor(self.backbone, tokens, ours.kind, ours.positions, ours.conditional, ours.merge)

    @cached_property
    def _row_bytes(self) -> float:
        """Bytes of one token's keys and values in all layers, as the model holds them."""
        ids = torch.zeros(1, 2, dtype=torch.int64, device=self.backbone.device)
        with self._base():
            return cache_bytes(decoder(self.backbone)(ids, use_cache=True).past_key_values) / 2

    @contextmanager
    def _base(self) -> Iterator[None]:
        """The base model as it came: without adapters and dropout."""
        training = self.backbone.training
        try:
            with self.backbone.disable_adapter():
                self.backbone.eval()
                yield
        finally:
            self.backbone.train(training)

    def _targets(self, batch: Batch, last: bool) -> torch.Tensor:
        """Tokens that are predicted, bool `[B, T - 1]` from the second token on; with `last`, of the last segment.

        Raises:
            UserError: If a memory token is to be predicted.
        """
        foreign = (batch["labels"] >= self.tokens.vocabulary).nonzero()
        if len(foreign):
            row, token = foreign[0].tolist()
            raise UserError(
                f"labels: row {row} asks for a memory token at token {token}, which the LM head cannot say: use -100"
            )
        chosen = batch["labels"][:, 1:] != -100
        if not last:
            return chosen
        cut = (batch["cut"] & batch["attention_mask"].bool()).long()
        ended = cut.cumsum(-1)
        before = ended - cut if self.kind in ISOLATED else ended
        return chosen & (before[:, :-1] == ended[:, -1:])

    def _read(self, compressor: Compressor, batch: Batch) -> torch.Tensor:
        """Hidden states `[B, T, E]` of the batch's own tokens."""
        ids, mask, cut = batch["input_ids"], batch["attention_mask"], batch["cut"]
        if compressor.kind in PLAIN:
            output: torch.Tensor = compressor.hidden(ids, mask, batch["prompt"], cut).last_hidden_state
            return output
        inserted = insert_runs(ids, mask, cut, self.tokens.vocabulary, self.slots)
        kept = inserted.moved(batch["prompt"]) if self.keep_prompt else None
        if self.sink:
            kept = _first(inserted.attention_mask)
        hidden = compressor.hidden(inserted.input_ids, inserted.attention_mask, kept).last_hidden_state
        return hidden.gather(1, inserted.place[..., None].expand(-1, -1, hidden.shape[-1]))

    # ------------------------------------------------------------------ evaluation

    @torch.no_grad()
    def records(self, batch: Batch) -> list[Record]:
        """Teacher-forced scores of the last segment, by the method, the base model and the untrained method."""
        arms = {METHOD: self._scores(self.compressor, batch, nullcontext())}
        for kind in PLAIN:
            arms[kind] = self._scores(self._plain(kind), batch, self._base())
        if self.kind not in PLAIN:
            arms[UNTRAINED] = self._scores(self._untrained, batch, self._base())
        records = []
        for row, number in enumerate(batch["id"].tolist()):
            ours = arms[METHOD][row]
            about = {"correct": ours["exact"], "loss": ours["nll"] / max(ours["tokens"], 1)}
            records.append({"id": number, **about, "arms": {name: scores[row] for name, scores in arms.items()}})
        return records

    def _scores(self, compressor: Compressor, batch: Batch, adapters: AbstractContextManager[Any]) -> list[Record]:
        with adapters:
            hidden = self._read(compressor, batch)[:, :-1]
        mask = batch["attention_mask"].bool()
        cut = batch["cut"] & mask
        targets = batch["labels"][:, 1:]
        segment = cut.long().cumsum(-1) - cut.long()
        graded = self._targets(batch, last=True)
        logits = compressor.logits(hidden[graded]).float()
        nll = torch.zeros_like(targets, dtype=torch.float32)
        nll[graded] = F.cross_entropy(logits, targets[graded], reduction="none")
        wrong = torch.zeros_like(graded)
        wrong[graded] = logits.argmax(-1) != targets[graded]
        kept = batch["prompt"] if self.keep_prompt or compressor.kind in PLAIN else _first(mask) & self.sink
        scores = []
        for row in range(len(targets)):
            sizes = segment[row][mask[row] & ~kept[row]].bincount(minlength=int(cut[row].sum()) + 1).tolist()
            held = rows_held(compressor.kind, int(kept[row].sum()), sizes, self.slots, self._row_bytes)
            tokens, errors = int(graded[row].sum()), int(wrong[row].sum())
            score = {"exact": errors == 0, "right": tokens - errors, "tokens": tokens, "nll": float(nll[row].sum())}
            scores.append({**score, **held})
        return scores

    def summarize(self, records: Sequence[Record]) -> Summary:
        """Exact match, token accuracy and loss of the last segment, rows of KV, and differences to the arms."""
        return summarize(records, self.seed)


def _first(mask: torch.Tensor) -> torch.Tensor:
    """The first token of each row that is no padding, bool `[B, T]`."""
    return mask.bool() & (mask.long().cumsum(-1) == 1)
