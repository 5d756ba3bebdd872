"""The COMP classifier: learns from hidden states where in a chain of thought to compress."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch.nn import functional as F
from torchmetrics.functional.classification import binary_average_precision

from kvc.core import seeds
from kvc.core.backbone import Backbone
from kvc.core.files import digest
from kvc.core.method import Method, StepOutput
from kvc.core.module import Batch, Record
from kvc.core.optim import Optim
from kvc.core.ranking import Ranking
from kvc.core.results import Summary
from kvc.methods.comp.head import CompHead
from kvc.methods.comp.scoring import summarize
from kvc.methods.comp.states import reasoning_states
from kvc.methods.comp.store import HiddenStore, build_store, cache_root

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from kvc.data.comp import CompTraces

Balance = Literal["balanced", "weighted", "focal"]


class CompClassifier(Method):
    """A small head on the frozen model's last hidden state predicts: after this token, a COMP follows.

    The model never changes, so its hidden states are computed once, kept on disk and memory-mapped; every epoch then
    trains the head alone. Source: dynamic compression of reasoning, phase 2.

    Args:
        backbone: Frozen base model.
        balance: How the rarity of positives is met. `balanced`: as many distinct negatives as the trace has
            positives, drawn anew each epoch. `weighted`: every token, positives weighted by the train split's ratio.
            `focal`: every token, easy ones down-weighted.
        focal_gamma: Exponent of the focal loss.
        dropout: Dropout inside the head.
        cache: Keep hidden states on disk (`$KVC_CACHE`, else ~/.cache/kvc); false runs the model again for every batch.
        optim: Optimiser of the head.
        seed: Seed of the run.
    """

    needs: ClassVar[tuple[str, ...]] = ("id", "rows", "labels", "draw")
    monitor: ClassVar[tuple[str, str]] = ("val/average_precision", "max")
    headline: ClassVar[tuple[str, ...]] = ("average_precision", "f1", "accuracy", "roc_auc", "count_error")
    frozen: tuple[str, ...] = ()

    def __init__(
        self,
        backbone: Backbone | None = None,
        balance: Balance = "balanced",
        focal_gamma: float = 2.0,
        dropout: float = 0.1,
        cache: bool = True,
        optim: Optim | None = None,
        seed: int = seeds.DEFAULT_SEED,
    ) -> None:
        super().__init__(optim or Optim(lr=5e-5), seed)
        self.base = backbone or Backbone()
        if self.base.lora is not None:
            raise ValueError("model.backbone.lora: the classifier reads a frozen model, it trains no adapter")
        self.balance, self.focal_gamma, self.cache = balance, focal_gamma, cache
        self.tokenizer = self.base.load_tokenizer()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.head = CompHead(int(self.base.load_config().hidden_size), dropout)
        self.threshold: torch.Tensor
        self.rate: torch.Tensor
        self.register_buffer("threshold", torch.tensor(0.5))
        self.register_buffer("rate", torch.tensor(0.0))
        self._val_scores: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._base_hash = self.base.identity(seed)
        # Not a submodule: Lightning must neither move, wrap nor save what the store makes superfluous.
        self._model: list[Any] = []
        self._store: HiddenStore | None = None

    def base_identity(self) -> dict[str, Any]:
        """Name and hash of the frozen model."""
        return {"name": self.base.pretrained, "hash": self._base_hash}

    def group_of(self, name: str) -> str:
        """Everything trained is the head."""
        return "head"

    # ------------------------------------------------------------------ hidden states

    def model(self) -> Any:
        """The frozen base model on this module's device, loaded on first use."""
        if not self._model:
            self._model.append(self.base.load().eval())
        return self._model[0].to(self.device)

    def data(self) -> "CompTraces":
        """The datamodule of the running trainer."""
        return self.trainer.datamodule  # type: ignore[attr-defined]

    def _open_store(self) -> None:
        if not self.cache or self._store is not None:
            return
        data = self.data()
        # What was run through the model, not where it came from: templates and tokenizers may change under a name.
        tokens = [[item.prompt_ids, item.ids] for item in data.labelled]
        settings = [self.base.dtype, self.base.attn_implementation, str(self.trainer.precision)]
        key = digest([self._base_hash, settings, tokens])
        lengths = [len(item.ids) for item in data.labelled]
        folder = cache_root() / "hidden" / key
        self._store = build_store(folder, lengths, self._states_of, self.global_rank, self.trainer.world_size)
        self._model.clear()

    def _states_of(self, traces: range) -> torch.Tensor:
        items = [self.data().labelled[i] for i in traces]
        with self.trainer.precision_plugin.forward_context():
            states = reasoning_states(self.model(), [i.prompt_ids for i in items], [i.ids for i in items])
        return torch.cat(states)

    def hidden(self, batch: Batch, chosen: torch.Tensor) -> torch.Tensor:
        """Hidden states `[N, D]` of the chosen positions `[B, T]` of a batch, rounded to bf16, stored or not."""
        if self._store is not None:
            return self._store.gather(batch["rows"][chosen]).to(self.device)
        states = self._recompute(batch)
        return states[chosen].to(torch.bfloat16)

    def _recompute(self, batch: Batch) -> torch.Tensor:
        items = [self.data().labelled[int(i)] for i in batch["id"]]
        states = reasoning_states(self.model(), [i.prompt_ids for i in items], [i.ids for i in items])
        padded = torch.nn.utils.rnn.pad_sequence(states, batch_first=True)
        return torch.nn.functional.pad(padded, (0, 0, 0, batch["labels"].shape[1] - padded.shape[1]))

    # ------------------------------------------------------------------ training

    def on_fit_start(self) -> None:
        """Compute the hidden states, or find them on disk."""
        super().on_fit_start()
        self._open_store()
        self.rate.fill_(self.data().train_rate())

    def on_test_start(self) -> None:
        """Compute the hidden states, or find them on disk."""
        super().on_test_start()
        self._open_store()

    def choose(self, batch: Batch) -> torch.Tensor:
        """Which positions `[B, T]` the loss is taken over."""
        labels = batch["labels"]
        if self.balance != "balanced" or not self.training:
            return labels >= 0
        positive, negative = labels == 1, labels == 0
        # The k negatives with the smallest draws are k distinct negatives, uniformly.
        rank = batch["draw"].masked_fill(~negative, 2.0).argsort(-1).argsort(-1)
        return positive | (negative & (rank < positive.sum(-1, keepdim=True)))

    def step(self, batch: Batch) -> StepOutput:
        """Binary cross-entropy over the chosen positions."""
        chosen = self.choose(batch)
        labels = batch["labels"][chosen].float()
        logits = self.head(self.hidden(batch, chosen))
        weight = (1 - self.rate) / self.rate.clamp(min=1e-6) if self.balance == "weighted" else None
        loss = F.binary_cross_entropy_with_logits(logits, labels, reduction="none", pos_weight=weight)
        if self.balance == "focal":
            probability = logits.sigmoid()
            wrong = torch.where(labels == 1, 1 - probability, probability)
            loss = loss * wrong**self.focal_gamma
        if not self.training:
            self._val_scores.append((logits.detach().sigmoid(), labels.long()))
        return StepOutput(loss.sum(), torch.tensor(labels.numel()).to(loss))

    def on_validation_epoch_end(self) -> None:
        """Average precision over all positions of all ranks, and the threshold of the best F1."""
        super().on_validation_epoch_end()
        if self.trainer.sanity_checking:
            self._val_scores.clear()
            return
        scores = torch.cat([s for s, _ in self._val_scores])
        labels = torch.cat([t for _, t in self._val_scores])
        self._val_scores.clear()
        if self.trainer.world_size > 1:
            parts: list[Any] = [None] * self.trainer.world_size
            torch.distributed.all_gather_object(parts, (scores.cpu(), labels.cpu()))
            scores, labels = (torch.cat([part[i] for part in parts]) for i in (0, 1))
        self.log("val/average_precision", binary_average_precision(scores, labels), prog_bar=True)
        units = torch.zeros(len(labels), dtype=torch.long)
        ranking = Ranking(scores.cpu().double().numpy(), labels.cpu().numpy(), units.numpy())
        f1, threshold = ranking.best_f1(torch.ones(1).numpy())
        self.threshold.fill_(threshold)
        self.log("val/f1", f1)

    # ------------------------------------------------------------------ evaluation

    @torch.no_grad()
    def records(self, batch: Batch) -> list[Record]:
        """Probability at every reasoning token of each trace, with labels and what the trivial rules say."""
        every = batch["labels"] >= 0
        flat = self.head(self.hidden(batch, every)).sigmoid().double().cpu()
        records = []
        for number, scores in zip(batch["id"].tolist(), flat.split(every.sum(-1).tolist())):
            item = self.data().labelled[number]
            records.append(
                {
                    "id": number,
                    "scores": [float(f"{score:.6g}") for score in scores.tolist()],
                    "labels": item.labels,
                    "newline": item.newline,
                    "sentence": item.sentence,
                    "ends": item.ends,
                    "text": item.text,
                }
            )
        return records

    def summarize(self, records: Sequence[Record]) -> Summary:
        """Metrics of classifier and trivial rules, with paired differences."""
        return summarize(records, float(self.threshold), float(self.rate), self.seed)

    def figures(self, records: Sequence[Record], summary: Summary) -> "dict[str, Figure]":
        """Precision-recall curves, and one trace coloured by probability."""
        from kvc.methods.comp.picture import draw

        return {"classifier": draw(records, summary, float(self.threshold))}

    @torch.no_grad()
    def probabilities(self, question: str, reasoning: str, template: Literal["plain", "chat"] = "plain") -> list[Any]:
        """Where to compress a given piece of reasoning.

        Args:
            question: The problem.
            reasoning: Reasoning text without markers.
            template: How the question is presented: give the one that the training data had.

        Returns:
            For each token the pair (offset of its last character plus one, probability that a COMP follows).
        """
        from kvc.data.comp import label_trace
        from kvc.data.traces import Trace

        item = label_trace(Trace(question, reasoning, ""), 0, self.tokenizer, template)
        states = reasoning_states(self.model(), [item.prompt_ids], [item.ids])[0].to(torch.bfloat16)
        return list(zip(item.ends, self.head(states).sigmoid().tolist()))
