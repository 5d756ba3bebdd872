"""A learned compressor of contexts as a method: trained on questions, scored by the official rules."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
from torch.nn import functional as F

from kvc.core import seeds
from kvc.core.backbone import Backbone, Lora
from kvc.core.method import Method, StepOutput
from kvc.core.module import Batch, Record
from kvc.core.optim import Optim
from kvc.core.results import Summary
from kvc.errors import UserError
from kvc.methods.squad.anchor import Anchors
from kvc.methods.squad.answers import answer, end_tokens, now, texts
from kvc.methods.squad.assembly import Positions
from kvc.methods.squad.baselines import CONTROLS, METHOD, PLAIN, SIZED, Arms, Stored, bare, label, nothing, slot_counts
from kvc.methods.squad.budget import Budget, FixedRatio
from kvc.methods.squad.evaluation import NEEDS, records_of
from kvc.methods.squad.interface import SlotCompressor
from kvc.methods.squad.lesson import geometry, look
from kvc.methods.squad.lessons import Lessons
from kvc.methods.squad.losses import Kd, Mix, Predicted, TeacherForcing, Term
from kvc.methods.squad.mean_pool import MeanPool
from kvc.methods.squad.memory_size import row_bytes
from kvc.methods.squad.readers import TextReader
from kvc.methods.squad.reading import Reading, Tokens
from kvc.methods.squad.records import graded
from kvc.methods.squad.scale import embedding_rms
from kvc.methods.squad.scoring import summarize
from kvc.methods.squad.settings import check_control, check_lessons, check_settings, make_reader
from kvc.methods.squad.source import Source

QUERIES = ("queries", "slots", "places", "table")
"""Parameters of compressors that are made for single slots."""


class ContextCompressor(Method):
    """A passage becomes a few slots, from which the language model answers questions about it.

    The language model is frozen; trained are the compressor and, where `backbone.lora` is given, adapters. Evaluations
    generate answers greedily and stand beside the frozen model with the full text, without it, and with as many tokens
    as there are slots.

    Args:
        backbone: Base model; LoRA r = 16 if null.
        compressor: What makes slots of a context, called with the width of the model and the root mean square of its
            embeddings; `MeanPool` if null.
        budget: Slots of a context; one for 8 tokens if null.
        source: What the compressor reads; contextual states if null.
        losses: Terms of the training loss; `Kd` and `TeacherForcing` if null, in controls `TeacherForcing`.
        mode: `compress`, or a control that is tuned on the same data with the `full_text` or with `no_context`.
        teacher: Model that distillation learns from, with the full text, loaded for training; null for the base model
            itself. A tuned control: the same base with `merge_adapter: FOLDER`, an export of the control.
        positions: Where slots stand: `compact`, as a short text, or `spread` over the places of the text.
        frozen_decoder: Read slots and answer without the adapters, which then only read the text.
        train_budget: Budget of training steps; null for `budget`.
        lessons: Short texts and many slots first; null for whole contexts under the budget from the first step.
        max_length: Tokens that are compressed at once; a longer text is compressed in pieces.
        max_new_tokens: Limit of an answer.
        baselines: Run folders of `TextBaselines` and of trained controls on the same questions, whose arms stand beside
            this method; what they lack is computed.
        optim: Optimiser; groups: compressor, queries (what is made for single slots), lora.
        seed: Seed of the run.
    """

    needs: ClassVar[tuple[str, ...]] = (*NEEDS, "group", "span")
    headline: ClassVar[tuple[str, ...]] = ("f1", "em", "f1_recovered", "ratio", "kv_tokens_context")
    frozen = ("backbone", "teacher")

    def __init__(
        self,
        backbone: Backbone | None = None,
        compressor: Callable[[int, float], SlotCompressor | Anchors] | None = None,
        budget: Budget | None = None,
        source: Source | None = None,
        losses: list[Term] | None = None,
        mode: Literal["compress", "full_text", "no_context"] = "compress",
        teacher: Backbone | None = None,
        positions: Positions = "compact",
        frozen_decoder: bool = False,
        train_budget: Budget | None = None,
        lessons: Lessons | None = None,
        max_length: int = 512,
        max_new_tokens: int = 32,
        baselines: list[str] | None = None,
        optim: Optim | None = None,
        seed: int = seeds.DEFAULT_SEED,
    ) -> None:
        self.base = backbone or Backbone(lora=Lora(r=16, alpha=32, dropout=0.1))
        lora = self.base.lora is not None
        default = Optim(lr=1e-4, lrs={"lora": 5e-5} if lora else {}, weight_decay=0.01, warmup=0.05)
        super().__init__(optim or default, seed)
        if mode in CONTROLS:
            check_control(mode, lora, positions, compressor, source, teacher, train_budget)
        self.mode, self.budget, self.frozen_decoder = mode, budget or FixedRatio(8), frozen_decoder
        self.train_budget, self.lessons, self.progress = train_budget or self.budget, lessons, 0.0
        self.max_length, self.max_new_tokens = max_length, max_new_tokens
        self.tokenizer = self.base.load_tokenizer()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.backbone = self.base.load()
            table: Any = self.backbone.get_input_embeddings()
            width, self.rms = int(table.weight.shape[1]), embedding_rms(table)
            made = (compressor or MeanPool)(width, self.rms) if mode == "compress" else None
            terms = losses or ([Kd(), TeacherForcing()] if made is not None else [TeacherForcing()])
            self.mix = Mix(terms, width)
        self.teacher: Any
        self.compressor = made
        bos = self.tokenizer.bos_token_id
        self.reader = make_reader(made, source, positions, self.base, self.backbone, max_length, bos)
        self.teaching, self.teacher = teacher, None
        pieces = None if isinstance(made, Anchors) else max_length
        self.arms = Arms(self.tokenizer, pieces, max_new_tokens, seed)
        self.stored = Stored(baselines or [])
        self._identity = self.base.identity(seed)
        check_settings(mode, self.mix.needs, self.reader, self.base, frozen_decoder, teacher is not None)

    def base_identity(self) -> dict[str, Any]:
        """Name and hash of the base model."""
        return {"name": self.base.pretrained, "hash": self._identity}

    def group_of(self, name: str) -> str:
        """`queries` for what is made for single slots, `lora`, or `compressor` for the rest."""
        if name.startswith("compressor.") and name.rsplit(".", 1)[-1] in QUERIES:
            return "queries"
        return "lora" if ".lora_" in name else "compressor"

    def sizes(self) -> dict[str, int]:
        """Parameter counts, of compressor and LoRA apart."""
        lora = sum(p.numel() for name, p in self.named_parameters() if ".lora_" in name)
        own = 0 if self.compressor is None else sum(p.numel() for p in self.compressor.parameters())
        return {**super().sizes(), "compressor_parameters": own, "lora_parameters": lora}

    def train(self, mode: bool = True) -> "ContextCompressor":
        """Switch dropout; the teacher never drops anything."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    def setup(self, stage: str) -> None:
        """Load the teacher; check stored baselines and the lengths of the texts before anything is trained."""
        if stage == "fit":
            self.stored.check()
            self.load_teacher()
        data: Any = self._trainer.datamodule if self._trainer is not None else None  # type: ignore[attr-defined]
        if stage == "fit" and self.lessons is not None:
            check_lessons(self.train_budget, getattr(data, "scope", "context"))
        if getattr(self.budget, "policy", None) == "refuse" and getattr(data, "scope", "") == "context":
            for split in ("train", "val") if stage == "fit" else (data.eval_split,):
                cut = split == "train" or data.long_eval == "truncate"
                longest = data.context_length if cut else None
                lengths = [len(encoded.context[:longest]) for _, encoded in data.rows(split)]
                slot_counts(self.budget, torch.tensor(lengths), self.arms.max_length)

    def load_teacher(self) -> None:
        """Load the model that teaches; only training needs it.

        Raises:
            UserError: If it has another vocabulary.
        """
        if self.teaching is None or self.teacher is not None:
            return
        self.teacher = self.teaching.load().requires_grad_(False).eval().to(self.backbone.device)
        ours, theirs = (len(m.get_input_embeddings().weight) for m in (self.backbone, self.teacher))
        if ours != theirs:
            raise UserError(f"model.teacher: has {theirs} tokens in its vocabulary, the base model {ours}")

    # ------------------------------------------------------------------ training

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Tell the compressor how much of the training is over."""
        super().on_train_batch_start(batch, batch_idx)
        self.progress = self.global_step / self.total_steps()
        if isinstance(self.compressor, SlotCompressor):
            self.compressor.progress = self.progress

    def step(self, batch: Batch) -> StepOutput:
        """The terms of the loss in training; in validation the cross-entropy of the answers, whatever the terms."""
        if not self.training:
            gold = self.predict(self.read(batch), batch, Tokens.of(batch, "answer"))
            loss = F.cross_entropy(gold.logits.float(), gold.targets, reduction="sum")
            return StepOutput(loss, torch.tensor(len(gold.targets), device=loss.device))
        if self.lessons is not None:
            batch = self.lessons.shortened(batch, self.progress)
        evidence, gold = look(self, self.mix, batch)
        mixed = self.mix(evidence, torch.tensor(len(gold.targets), device=gold.targets.device))
        return StepOutput(mixed.loss_sum, mixed.num_tokens, {**mixed.raw, **geometry(evidence, self.rms)})

    def read(self, batch: Batch, budget: Budget | None = None) -> Reading:
        """What stands for head and context of a batch: slots, anchors, or in controls the text or nothing.

        Args:
            batch: See `kvc.data.squad.Squad`.
            budget: That of the mode, training or evaluation, if null.
        """
        if self.mode == "no_context":
            head = bare(batch, self.tokenizer)
            return self.reader.read(self.backbone, head, nothing(head), self.budget)
        head, context = Tokens.of(batch, "head"), Tokens.of(batch, "context")
        return self.reader.read(self.backbone, head, context, budget or self._budget())

    def _budget(self) -> Budget:
        if not self.training:
            return self.budget
        if self.lessons is None:
            return self.train_budget
        most = self.compressor.most if isinstance(self.compressor, SlotCompressor) else None
        return self.lessons.budget(self.train_budget, self.progress, most)

    def predict(self, reading: Reading, batch: Batch, answer: Tokens) -> Predicted:
        """Predictions of answers that follow the questions."""
        with self._decoder():
            return reading.predict(self.backbone, self._tail(batch), answer)

    def _tail(self, batch: Batch) -> Tokens:
        tail = Tokens.of(batch, "tail")
        return nothing(tail) if self.mode == "no_context" else tail

    @torch.no_grad()
    def say(self, batch: Batch, sample: bool = False) -> torch.Tensor:
        """Answers of the student itself, `[B, L]` with -100 for padding, without dropout."""
        training, budget = self.training, self._budget()
        self.eval()
        try:
            reading = self.read(batch, budget)
            with self._decoder():
                ends = end_tokens(self.backbone, self.tokenizer)
                return answer(self.backbone, reading, self._tail(batch), self.max_new_tokens, ends, sample).ids
        finally:
            self.train(training)

    @torch.no_grad()
    def taught(self, batch: Batch, answer: Tokens) -> torch.Tensor:
        """Logits `[N, V]` of the teacher, who reads the full text."""
        head, context, tail = (Tokens.of(batch, part) for part in ("head", "context", "tail"))
        with self._frozen() if self.teacher is None else nullcontext():
            model = self.backbone if self.teacher is None else self.teacher
            return TextReader().read(model, head, context).predict(model, tail, answer).logits

    def rewards(self, batch: Batch, ids: torch.Tensor) -> torch.Tensor:
        """F1 of answers, fp32 `[B]`."""
        said = texts(self.tokenizer, ids)
        scores = [question.score(text).f1 for question, text in zip(batch["questions"], said)]
        return torch.tensor(scores, device=ids.device)

    @contextmanager
    def _frozen(self) -> Iterator[None]:
        """The base model as it came: without adapters and dropout."""
        training = self.backbone.training
        try:
            with self._without_adapters():
                self.backbone.eval()
                yield
        finally:
            self.backbone.train(training)

    def _without_adapters(self) -> Any:
        return self.backbone.disable_adapter() if self.base.lora is not None else nullcontext()

    def _decoder(self) -> Any:
        return self._without_adapters() if self.frozen_decoder else nullcontext()

    # ------------------------------------------------------------------ evaluation

    def on_test_start(self) -> None:
        """Take over the baselines that were measured before."""
        super().on_test_start()
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        self.stored.load(data.eval_split, data.data_hash(), self._identity, self.max_new_tokens)

    @cached_property
    def _row_bytes(self) -> float:
        with self._frozen():
            return row_bytes(self.backbone)

    @torch.no_grad()
    def records(self, batch: Batch) -> list[Record]:
        """Greedy answers with the slots, and of every baseline."""
        start = now(self.backbone.device)
        reading = self.read(batch)
        seconds = now(self.backbone.device) - start
        tail = self._tail(batch)
        with self._decoder():
            ends = end_tokens(self.backbone, self.tokenizer)
            said = answer(self.backbone, reading, tail, self.max_new_tokens, ends)
        questions: Any = batch["questions"]
        ours = graded(questions, self.tokenizer, said, reading, tail, seconds, self._row_bytes)
        arms = {METHOD: ours}
        wanted: dict[str, Budget | None] = dict.fromkeys(PLAIN)
        if self.mode == "compress":
            wanted |= dict.fromkeys(SIZED, self.budget)
        for name, budget in wanted.items():
            stored = name if budget is None else f"{name} {label(budget)}"
            arms[name] = self._stored(batch, stored, budget) or self._measured(batch, name, budget)
        for name in CONTROLS.values():
            if found := self._stored(batch, name):
                arms[name] = found
        return records_of(batch, arms)

    def _stored(self, batch: Batch, arm: str, budget: Budget | None = None) -> list[Record]:
        found = [self.stored.of(arm, number) for number in batch["id"].tolist()]
        records = [record for record in found if record is not None]
        if budget is not None:
            # Other pieces of long texts, other numbers of tokens.
            counts = self.arms.counts(arm.split()[0], budget, batch["context_mask"].sum(1)).tolist()
            records = [record for record, count in zip(records, counts) if record["kv_tokens_context"] == count]
        return records if len(records) == len(found) else []

    def _measured(self, batch: Batch, arm: str, budget: Budget | None) -> list[Record]:
        with self._frozen():
            return self.arms.records(self.backbone, batch, arm, budget, self._row_bytes)

    def summarize(self, records: Sequence[Record]) -> Summary:
        """F1 and exact match, what is recovered of the full text's, real ratios, and the collapse alarm."""
        return summarize(records, self.seed, self.max_length)
