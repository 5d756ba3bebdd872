"""Plain language modelling: trains the tiny base model, or tunes any base model on the full context (the control)."""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch.nn import functional as F

from kvc.core import seeds
from kvc.core.backbone import Backbone, head_logits
from kvc.core.method import Method, StepOutput
from kvc.core.module import Batch, Record
from kvc.core.optim import Optim
from kvc.core.results import Summary
from kvc.methods.lm.grading import grade, summarize


class LanguageModel(Method):
    """Next-token prediction with a weight on every token.

    Batch: `input_ids` `[B, T]` right-padded, `labels` `[B, T]` (-100 where nothing is predicted) and optionally
    `weights` `[B, T]`, 1 where absent. The loss is the weighted mean over all tokens of the optimiser step.

    Args:
        backbone: Base model.
        train: `all` trains every weight (fp32), `lora` the adapters that `backbone.lora` describes.
        max_new_tokens: Limit of greedy answers in evaluations.
        optim: Optimiser; groups: embeddings, model, lora.
        seed: Seed of the run.
    """

    needs: ClassVar[tuple[str, ...]] = ("input_ids", "labels")
    frozen: tuple[str, ...] = ()

    def __init__(
        self,
        backbone: Backbone | None = None,
        train: Literal["all", "lora"] = "all",
        max_new_tokens: int = 640,
        optim: Optim | None = None,
        seed: int = seeds.DEFAULT_SEED,
    ) -> None:
        super().__init__(optim, seed)
        self.base = backbone or Backbone()
        if (train == "lora") != (self.base.lora is not None):
            raise ValueError("model.train: 'lora' needs backbone.lora, and backbone.lora needs train: lora")
        self.tokenizer = self.base.load_tokenizer()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.backbone = self.base.load()
        if train == "all":
            self.backbone.float().requires_grad_(True)
        else:
            self.frozen = ("backbone",)
        self.max_new_tokens = max_new_tokens
        self._identity = self.base.identity(seed)

    def base_identity(self) -> dict[str, Any]:
        """Name and hash of the starting weights."""
        return {"name": self.base.pretrained, "hash": self._identity}

    def group_of(self, name: str) -> str:
        """`embeddings`, `lora` or `model`."""
        return "embeddings" if "embed_tokens" in name or "lm_head" in name else super().group_of(name)

    def step(self, batch: Batch) -> StepOutput:
        """Weighted negative log-likelihood of the labels."""
        input_ids, labels = batch["input_ids"], batch["labels"][:, 1:]
        weights = batch["weights"][:, 1:] if "weights" in batch else torch.ones_like(labels, dtype=torch.float32)
        chosen = (labels != -100) & (weights > 0)
        # Rows are right-padded and attention is causal, so no token sees padding: no mask, the fast path.
        hidden = self._decoder()(input_ids=input_ids, use_cache=False).last_hidden_state[:, :-1]
        logits = head_logits(self.backbone, hidden[chosen]).float()
        loss = F.cross_entropy(logits, labels[chosen], reduction="none")
        weight = weights[chosen]
        hits = (logits.detach().argmax(-1) == labels[chosen]).float()
        hard = weight > 1
        accuracy = (hits * hard).sum() / hard.sum().clamp(min=1)
        return StepOutput((loss * weight).sum(), weight.sum(), {"result_accuracy": accuracy})

    def _decoder(self) -> Any:
        from kvc.core.backbone import decoder

        return decoder(self.backbone)

    def records(self, batch: Any) -> list[Record]:
        """Greedy completions of the prompts, graded."""
        return grade(self.backbone, self.tokenizer, batch["items"], self.max_new_tokens)

    def summarize(self, records: Sequence[Record]) -> Summary:
        """Exact match by task and difficulty."""
        return summarize(records, self.seed)
