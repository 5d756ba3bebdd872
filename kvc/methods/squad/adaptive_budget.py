"""Choosing the budget of each text, as a method on top of a trained compressor."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, ClassVar, NamedTuple

import torch

from kvc.core import seeds
from kvc.core.files import digest
from kvc.core.method import Method, StepOutput
from kvc.core.module import Batch, Record
from kvc.core.optim import Optim
from kvc.core.results import Summary
from kvc.errors import UserError
from kvc.methods.squad.adaptive import BudgetPredictor, balanced_loss, smallest_sufficient
from kvc.methods.squad.adaptive_scoring import summarize
from kvc.methods.squad.answers import answer, end_tokens, texts
from kvc.methods.squad.baselines import label
from kvc.methods.squad.budget import Budget, FixedRatio
from kvc.methods.squad.cross_model import contents, trained_compressor
from kvc.methods.squad.evaluation import NEEDS
from kvc.methods.squad.readers import TextReader
from kvc.methods.squad.reading import Tokens

FULL = "full"


class Tried(NamedTuple):
    """Answers to a batch under one budget.

    Attributes:
        ids: `[B, L]`, -100 for padding.
        confidence: Mean log-probability of the answer's tokens, fp32 `[B]`.
        rows: Rows of KV that stood for each context, int64 `[B]`.
        means: Means of the source states, `[B, D]`; None for the full text.
    """

    ids: torch.Tensor
    confidence: torch.Tensor
    rows: torch.Tensor
    means: torch.Tensor | None


class AdaptiveBudget(Method):
    """Learns which budget a context needs: the smallest at which the compressed answers are nearly as good as they get.

    The compressor is frozen and should have been trained under all these budgets (`Sampled`). A small network reads the
    mean of the context's states and is trained on the questions: its label is the smallest budget whose F1 is at least
    the best one less `margin`. Evaluations compare it with every budget for all, with the cascade (answer under the
    smallest budget first, go on where the answer's tokens were improbable; the threshold is calibrated on the other
    half of the contexts), and with the choice that knows the scores.

    Args:
        compressor: Folder that `python -m kvc export` wrote for a `ContextCompressor`.
        budgets: From the smallest to the largest; ratios 32, 16, 8, 4 if null.
        keep: The full text, read by the base model, is the largest budget.
        margin: F1 that a smaller budget may lose, in training.
        loss: Mean F1 that the cascade may lose against the largest budget.
        hidden: Width of the network's inner layer.
        max_new_tokens: Limit of an answer.
        optim: Optimiser; group: model.
        seed: Seed of the run.
    """

    needs: ClassVar[tuple[str, ...]] = (*NEEDS, "group")
    headline: ClassVar[tuple[str, ...]] = ("f1", "em", "ratio", "kept_full")

    def __init__(
        self,
        compressor: str,
        budgets: list[Budget] | None = None,
        keep: bool = True,
        margin: float = 0.1,
        loss: float = 0.01,
        hidden: int = 128,
        max_new_tokens: int = 32,
        optim: Optim | None = None,
        seed: int = seeds.DEFAULT_SEED,
    ) -> None:
        super().__init__(optim or Optim(lr=1e-3, warmup=0.05), seed)
        ladder: list[Budget] = [FixedRatio(r) for r in (32, 16, 8, 4)] if budgets is None else list(budgets)
        self.ladder: list[Budget | None] = [*ladder, *([None] if keep else [])]
        if len(self.ladder) < 2:
            raise UserError("model.budgets: a choice needs two of them, or one and the full text")
        self.names = [FULL if budget is None else label(budget) for budget in self.ladder]
        self.margin, self.loss, self.max_new_tokens = margin, loss, max_new_tokens
        # In a list, so that it is no part of the method: no checkpoint holds it.
        self._foreign = [trained_compressor(compressor)]
        self._contents = contents(compressor)
        self.tokenizer = self.compressor.tokenizer
        width = int(self.compressor.backbone.get_input_embeddings().weight.shape[1])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.predictor = BudgetPredictor(width, len(self.ladder), hidden)

    @property
    def compressor(self) -> Any:
        """The frozen compressor, where the method is."""
        return self._foreign[0].to(self.device)

    def base_identity(self) -> dict[str, Any]:
        """Name of the base model, and a hash of it and of the compressor."""
        base = self._foreign[0].base_identity()
        return {"name": base["name"], "hash": digest([base["hash"], self._contents])}

    def step(self, batch: Batch) -> StepOutput:
        """Balanced cross-entropy of the smallest sufficient budget, a mean over rows."""
        tried = self.tries(batch)
        labels = smallest_sufficient(self._scores(batch, tried), self.margin)
        logits = self._logits(batch, tried)
        rows = torch.tensor(len(labels), device=logits.device)
        hits = (logits.argmax(1) == labels).float().mean()
        return StepOutput(balanced_loss(logits, labels) * rows, rows, {"right_budget": hits})

    @torch.no_grad()
    def tries(self, batch: Batch) -> list[Tried]:
        """Greedy answers under every budget."""
        return [self._tried(batch, budget) for budget in self.ladder]

    def _tried(self, batch: Batch, budget: Budget | None) -> Tried:
        compressor = self.compressor
        model, ends = compressor.backbone, end_tokens(compressor.backbone, self.tokenizer)
        head, context, tail = (Tokens.of(batch, part) for part in ("head", "context", "tail"))
        if budget is None:
            with getattr(model, "disable_adapter", nullcontext)():
                reading = TextReader().read(model, head, context)
                ids = answer(model, reading, tail, self.max_new_tokens, ends).ids
                predicted = reading.predict(model, tail, Tokens.labelled(ids))
        else:
            compressor.budget, compressor.max_new_tokens = budget, self.max_new_tokens
            reading = compressor.read(batch)
            ids = compressor.say(batch)
            predicted = compressor.predict(reading, batch, Tokens.labelled(ids))
        means = None if budget is None else reading.reference
        return Tried(ids, predicted.row_means(predicted.log_probs), reading.counts, means)

    def _scores(self, batch: Batch, tried: Sequence[Tried]) -> torch.Tensor:
        """F1 of every answer, fp32 `[B, K]`."""
        return torch.stack([self.compressor.rewards(batch, one.ids) for one in tried], dim=1)

    def _logits(self, batch: Batch, tried: Sequence[Tried]) -> torch.Tensor:
        means = tried[0].means
        assert means is not None, "the smallest budget is one of the compressor"
        logits: torch.Tensor = self.predictor(means.detach().float(), batch["context_mask"].sum(1))
        return logits

    @torch.no_grad()
    def records(self, batch: Batch) -> list[Record]:
        """What was answered under every budget, and which one the network would have taken."""
        tried = self.tries(batch)
        chosen = self._logits(batch, tried).argmax(1).tolist()
        said = [texts(self.tokenizer, one.ids) for one in tried]
        lengths, groups = batch["context_mask"].sum(1).tolist(), batch["group"].tolist()
        questions: Any = batch["questions"]
        records = []
        for row, question in enumerate(questions):
            tries = {}
            for name, one, answers in zip(self.names, tried, said):
                score = question.score(answers[row])
                counts = {"rows": int(one.rows[row]), "confidence": float(one.confidence[row])}
                tries[name] = {"answer": score.text, "em": score.em, "f1": score.f1, **counts}
            records.append(
                {
                    "id": int(batch["id"][row]),
                    "group": question.group,
                    "gold": question.gold,
                    "context_tokens": lengths[row],
                    "fold": groups[row] % 2,
                    "chosen": self.names[chosen[row]],
                    "correct": tries[self.names[chosen[row]]]["em"],
                    "tries": tries,
                }
            )
        return records

    def summarize(self, records: Sequence[Record]) -> Summary:
        """Scores and average ratios of the network's choices, of fixed budgets, of the cascade and of the oracle."""
        return summarize(records, self.seed, self.margin, self.loss)
