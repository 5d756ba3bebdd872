"""Gist tokens as a method: ordinary fine-tuning with a mask, evaluated by answering from the gist rows alone."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from kvc.cache.accounting import cache_bytes
from kvc.cache.memory import KVMemory
from kvc.core import seeds
from kvc.core.backbone import Backbone, decoder, head_logits
from kvc.core.method import Method, StepOutput
from kvc.core.module import Record
from kvc.core.optim import Optim
from kvc.core.results import Summary
from kvc.errors import UserError
from kvc.methods.gist.answering import Clock, Prompts, answer, bare
from kvc.methods.gist.counts import FixedGists, GistCount
from kvc.methods.gist.reading import Control, GistReader, GistToken
from kvc.methods.gist.scoring import FULL, METHOD, NO_CONTEXT, TRAINED, summarize
from kvc.methods.gist.sequence import CONTEXT, GIST, HEAD, TAIL, GistSequence, sequence

PROMPT = (HEAD, CONTEXT, GIST)
PLAIN = (HEAD, CONTEXT, TAIL)


class GistTokens(Method):
    """A text becomes the keys and values of a few gist tokens behind it (Mu et al. 2023).

    K copies of one new token stand behind the text, and a mask hides everything before them from everything after
    them. There is no other loss than that of the answer.

    Batch: `head_ids`, `context_ids`, `tail_ids`, `answer_ids` `[B, P]` and a mask of each; `id` `[B]`; `questions`.

    Args:
        backbone: Base model.
        count: How many gist tokens a text gets: `FixedGists` (the default, 1) or `GistRatio`.
        control: `gist`; or `pos_control`: gist tokens without a mask; or `neg_control`: nothing of what stands before
            is seen.
        keep_head: What stands before the context (BOS, the instruction) stays visible. It is not compressed, and gives
            attention a first token to rest on. The paper compresses it, too.
        train: `all` trains every weight (fp32), as the paper does; `lora` the adapters of `backbone.lora`.
        max_new_tokens: Limit of greedy answers in evaluations.
        base_arms: Evaluations also answer with the base model's own weights; with `all` these are loaded beside the
            trained ones.
        optim: Optimiser; groups: gist, embeddings, model, lora.
        seed: Seed of the run.
    """

    needs: ClassVar[tuple[str, ...]] = (
        "id",
        "questions",
        *(f"{part}_{kind}" for part in ("head", "context", "tail", "answer") for kind in ("ids", "mask")),
    )
    headline: ClassVar[tuple[str, ...]] = ("em", "f1", "rouge_l", "correct", "ratio", "kv_tokens_peak", "kv_bytes_peak")
    frozen: tuple[str, ...] = ()

    def __init__(
        self,
        backbone: Backbone | None = None,
        count: GistCount | None = None,
        control: Control = "gist",
        keep_head: bool = False,
        train: Literal["all", "lora"] = "all",
        max_new_tokens: int = 32,
        base_arms: bool = True,
        optim: Optim | None = None,
        seed: int = seeds.DEFAULT_SEED,
    ) -> None:
        super().__init__(optim or Optim(lr=2e-5, warmup=0.03), seed)
        self.base = backbone or Backbone()
        if (train == "lora") != (self.base.lora is not None):
            raise UserError("model.train: 'lora' needs backbone.lora, and backbone.lora needs train: lora")
        if keep_head and control == "pos_control":
            raise UserError("model.keep_head: has no effect with the positive control, which sees everything")
        if max_new_tokens < 1:
            raise UserError(f"model.max_new_tokens must be at least 1, got {max_new_tokens}")
        self.count: GistCount = count or FixedGists()
        self.max_new_tokens, self.base_arms = max_new_tokens, base_arms
        self.tokenizer = self.base.load_tokenizer()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.backbone = self.base.load()
        if train == "all":
            self.backbone.float().requires_grad_(True)
        else:
            self.frozen = ("backbone",)
        self.gist = GistToken(self.backbone.get_input_embeddings())
        self.reader = GistReader(self.backbone, self.gist, control, keep_head)
        self._identity = self.base.identity(seed)

    def base_identity(self) -> dict[str, Any]:
        """Name and hash of the starting weights."""
        return {"name": self.base.pretrained, "hash": self._identity}

    def group_of(self, name: str) -> str:
        """`gist`, `embeddings`, `lora` or `model`."""
        if name.startswith("gist."):
            return "gist"
        return "embeddings" if "embed_tokens" in name or "lm_head" in name else super().group_of(name)

    def step(self, batch: Any) -> StepOutput:
        """Negative log-likelihood of the answers, summed."""
        whole = sequence(batch, self._counts(batch))
        targets = whole.labels[:, 1:]
        chosen = targets != -100
        logits = head_logits(self.backbone, self.reader.hidden(whole)[:, :-1][chosen]).float()
        return StepOutput(F.cross_entropy(logits, targets[chosen], reduction="sum"), chosen.sum())

    def _counts(self, batch: Any) -> torch.Tensor:
        if not bool(batch["tail_mask"].any(1).all()):
            raise UserError("data.scope: nothing stands behind the gist tokens to answer from, use the scope 'context'")
        return self.count.counts(batch["context_mask"].sum(1))

    # ------------------------------------------------------------------ inference

    @torch.no_grad()
    def compress(self, contexts: Sequence[str], head: str = "") -> KVMemory:
        """Read texts into a memory of their gist rows.

        Continue with `kvc.generation.decode.generate(method.backbone, ids, memory=memory.fork(), ...)`.

        Args:
            contexts: One text for each row of the batch, as it is: the contexts of `kvc.data.squad` begin with a blank.
            head: What stands before each, without BOS.

        Raises:
            UserError: If the model is in train mode.
        """
        if self.training:
            raise UserError("model: compressing in train mode would drop activations at random, call eval() first")
        bos = [] if self.tokenizer.bos_token_id is None else [self.tokenizer.bos_token_id]
        first = [*bos, *self.tokenizer(head, add_special_tokens=False)["input_ids"]] if head else bos
        texts = [self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in contexts]
        size = max(map(len, texts), default=0)
        whole: dict[str, Any] = {"dtype": torch.int64, "device": self.backbone.device}
        ids = torch.tensor([row + [0] * (size - len(row)) for row in texts], **whole)
        mask = torch.arange(size, device=ids.device) < torch.tensor([[len(row)] for row in texts], **whole)
        heads = torch.tensor([first] * len(texts), **whole)
        batch = {
            "context_ids": ids,
            "context_mask": mask,
            "head_ids": heads,
            "head_mask": torch.ones_like(heads).bool(),
        }
        return self.reader.compress(sequence(batch, self.count.counts(mask.sum(1)), PROMPT, left=True))

    @torch.no_grad()
    def records(self, batch: Any) -> list[Record]:
        """Answers from the gist rows; and with full text and without, by the trained weights and by the base model."""
        questions = batch["questions"]
        counts = self._counts(batch)
        clock = Clock(self.backbone.device)
        memory = self.reader.compress(sequence(batch, counts, PROMPT, left=True))
        read = clock.seconds() / len(questions)
        tail = _prompts(sequence(batch, counts, (TAIL,), left=True))
        arms = {METHOD: self._answer(self.backbone, questions, tail._replace(memory=memory))}
        plain = {FULL: _prompts(sequence(batch, torch.zeros_like(counts), PLAIN, left=True))}
        nothing = bare(self.tokenizer, questions, self.backbone.device)
        if nothing is not None:
            plain[NO_CONTEXT] = nothing
        for name, prompts in plain.items():
            arms[TRAINED + name] = self._answer(self.backbone, questions, prompts)
        if self.base_arms:
            with self._untouched() as base:
                for name, prompts in plain.items():
                    arms[name] = self._answer(base, questions, prompts)
        records = []
        lengths = batch["context_mask"].sum(1).tolist()
        for row, question in enumerate(questions):
            said = {name: answers[row] for name, answers in arms.items()}
            said[METHOD]["read_seconds"] = read
            about = {"id": int(batch["id"][row]), "group": question.group, "gold": question.gold}
            about |= {"context_tokens": lengths[row], "gists": int(counts[row])}
            if "em" in said[METHOD]:
                about["correct"] = said[METHOD]["em"]
            records.append({**about, "arms": said})
        return records

    def _answer(self, model: PreTrainedModel, questions: Any, prompts: Prompts) -> list[Record]:
        return answer(model, self.tokenizer, questions, prompts, self.max_new_tokens, self._row_bytes)

    @cached_property
    def _row_bytes(self) -> float:
        ids = torch.zeros(1, 2, dtype=torch.int64, device=self.backbone.device)
        return cache_bytes(decoder(self.backbone)(ids, use_cache=True).past_key_values) / 2

    @contextmanager
    def _untouched(self) -> Iterator[PreTrainedModel]:
        """The base model as it came."""
        if self.base.lora is None:
            yield self._copy.to(self.backbone.device)
            return
        with self.backbone.disable_adapter():
            yield self.backbone

    @cached_property
    def _copy(self) -> PreTrainedModel:
        """The weights that training began with; no submodule, so neither trained nor saved."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return self.base.load().float().eval()

    def summarize(self, records: Sequence[Record]) -> Summary:
        """Scores, ratios and costs with intervals, and differences to the arms."""
        return summarize(records, self.seed)


def _prompts(plain: GistSequence) -> Prompts:
    return Prompts(plain.input_ids, plain.valid.long())
