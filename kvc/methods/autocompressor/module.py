"""AutoCompressor as a method: trained in substeps, scored on the last segment of each document."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
from transformers import PreTrainedModel

from kvc.cache.accounting import cache_bytes
from kvc.core import seeds
from kvc.core.backbone import Backbone, decoder
from kvc.core.method import Method, StepOutput
from kvc.core.module import Batch, Record
from kvc.core.optim import Optim
from kvc.core.results import Summary
from kvc.errors import UserError
from kvc.methods.autocompressor.checkpoint import summary_table
from kvc.methods.autocompressor.compressor import Compressor, Reading
from kvc.methods.autocompressor.cutting import Cutting, even, halves
from kvc.methods.autocompressor.draws import stop_loss
from kvc.methods.autocompressor.evaluation import Arm, arms_of, last_segment
from kvc.methods.autocompressor.fixed import FixedSummary
from kvc.methods.autocompressor.in_context import choice_arms, choose, summarize_choices
from kvc.methods.autocompressor.lengths import Lengths
from kvc.methods.autocompressor.model import AutoCompressorModel
from kvc.methods.autocompressor.positions import extend_table
from kvc.methods.autocompressor.scoring import METHOD, summarize
from kvc.methods.autocompressor.substeps import substep_readings
from kvc.methods.autocompressor.summaries import Fixed, SummarySettings
from kvc.methods.autocompressor.variable import VariableSummary


class AutoCompressor(Method):
    """A model that reads a long text segment by segment, each after summary vectors of the earlier ones.

    Chevalier et al. 2023, "Adapting Language Models to Compress Contexts". Without `backbone.lora` every weight is
    trained, in fp32; with it, the adapters. What the summary adds is always trained.

    A training step runs the substeps of a block one after the other: the gradient of each is added before the next
    begins, and only the numbers of the soft prompt pass from one to the next. The first token of a substep is not
    predicted. A batch with the key `halves` is read as two equal segments instead.

    Args:
        backbone: Base model.
        summary: How a segment is summarised; 50 vectors if null.
        mode: `compress`, or `full_attention`: the control that is tuned on the same blocks, each read as one segment.
        training_substeps: Substeps of a block.
        segments_per_substep: Segments of a substep.
        segment_lengths: Lengths of the segments of every substep; empty: equal lengths. Only the end of a longer block
            is used.
        randomize_substeps: Draw new lengths at every step, the same on all ranks.
        min_segment_length: Least tokens of a segment of random length; null: as few as the model's positions allow.
        segment_gradient_checkpointing: Compute all segments but the last of a substep again in the backward pass.
        truncate_bptt_segments: A summary gets gradients from so many segments after it, within its substep; null: all.
        stops_from: Share of the training steps before the stopping of variable summaries is trained and paid for. Until
            then loops stop as often as at the start, whatever they read: a length that is paid for before vectors tell
            anything falls to 0, and one that is free is soon sure never to stop.
        stop_draws: Read each document of a training batch so many times, 2 or more, with hard stops that are drawn at
            random: summaries learn to be of any length, and stops by which draw was best. 0: once, with the soft gates
            of `summary`, as published.
        substep_loss: `tokens`: the loss per token of all substeps; `mean`: the sum over substeps of the loss per token
            of each, as published.
        max_position_embeddings: Extend OPT's table of positions; null leaves it. Evaluations read the full text only
            where it fits the table.
        base_arms: Evaluate the untrained base model too; without LoRA it is loaded a second time.
        optim: Optimiser; groups: model, lora, summary, stop (the prediction of `<eoc>`, which at a
            high rate is soon so sure that nothing changes it any more).
        seed: Seed of the run.
    """

    needs: ClassVar[tuple[str, ...]] = ("id", "input_ids", "attention_mask", "labels")
    headline: ClassVar[tuple[str, ...]] = (
        "loss",
        "perplexity",
        "answer_loss",
        "recovered",
        "kv_share",
        "kv_tokens_peak",
    )

    def __init__(
        self,
        backbone: Backbone | None = None,
        summary: SummarySettings | None = None,
        mode: Literal["compress", "full_attention"] = "compress",
        training_substeps: int = 1,
        segments_per_substep: int = 2,
        segment_lengths: Sequence[int] = (),
        randomize_substeps: bool = False,
        min_segment_length: int | None = None,
        segment_gradient_checkpointing: bool = False,
        truncate_bptt_segments: int | None = 1,
        stops_from: float = 0.0,
        stop_draws: int = 0,
        substep_loss: Literal["tokens", "mean"] = "tokens",
        max_position_embeddings: int | None = None,
        base_arms: bool = True,
        optim: Optim | None = None,
        seed: int = seeds.DEFAULT_SEED,
    ) -> None:
        super().__init__(optim or Optim(lr=2e-5, warmup=1000, schedule="linear"), seed)
        self.base = backbone or Backbone()
        self.full, self.substep_loss, self.base_arms = mode == "full_attention", substep_loss, base_arms
        if not 0 <= stops_from < 1:
            raise UserError(f"model.stops_from must be a share from 0 to below 1, got {stops_from}")
        if stop_draws < 0 or stop_draws == 1:
            raise UserError(f"model.stop_draws must be 0, or 2 or more, to compare with each other, got {stop_draws}")
        self.stops_from, self.stop_draws = stops_from, stop_draws
        if self.full and summary is not None:
            raise UserError("model.summary: has no effect with model.mode full_attention")
        self.max_position_embeddings = max_position_embeddings
        self.tokenizer = self.base.load_tokenizer()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.backbone = self._loaded(max_position_embeddings)
            if self.base.lora is None:
                self.backbone.float().requires_grad_(True)
            settings = summary or (Fixed(0) if self.full else Fixed())
            self.summary = settings.build(self.backbone, self.tokenizer)
        if not isinstance(self.summary, VariableSummary):
            for name, value in (("stops_from", stops_from), ("stop_draws", stop_draws)):
                if value:
                    raise UserError(f"model.{name}: has no effect without a summary of variable length")
        if isinstance(self.summary, FixedSummary) and self.summary.length:
            self._go_on(self.summary)
        self.compressor = Compressor(
            self.backbone, self.summary, segment_gradient_checkpointing, truncate_bptt_segments
        )
        self.compresses = not (isinstance(self.summary, FixedSummary) and self.summary.length == 0)
        self.summary.requires_grad_(self.compresses)
        if self.compresses and (len(segment_lengths) or segments_per_substep) < 2:
            raise UserError("model.segments_per_substep: nothing trains the summary of a single segment, use 2 or more")
        self.cutting = Cutting(
            training_substeps,
            segments_per_substep,
            segment_lengths,
            randomize_substeps,
            _positions(self.backbone),
            min_segment_length,
        )
        self._identity = self.base.identity(seed)
        self._plain: Compressor | None = None
        self._lengths: Lengths | None = None

    def _loaded(self, positions: int | None) -> PreTrainedModel:
        model = self.base.load()
        if positions is not None:
            extend_table(model, positions)
        return model

    @torch.no_grad()
    def _go_on(self, summary: FixedSummary) -> None:
        """Begin with the summary tokens of the base model, where that is an AutoCompressor."""
        published = getattr(self.backbone.config, "summary_length", None) and not self.base.from_config
        table = summary_table(self.base.location, self.base.revision) if published else None
        if table is None:
            return
        if table.shape != summary.embed_summary.weight.shape:
            raise UserError(
                f"model.summary.summary_length: {self.base.pretrained} is an AutoCompressor with {len(table)} summary "
                f"tokens, not {summary.length}"
            )
        summary.embed_summary.weight.copy_(table)

    def base_identity(self) -> dict[str, Any]:
        """Name and hash of the base model."""
        return {"name": self.base.pretrained, "hash": self._identity}

    def group_of(self, name: str) -> str:
        """`stop` for what stops a loop, `summary` for what else summaries add; `lora` or `model` for the rest."""
        if name.startswith("summary.controls.eoc_"):
            return "stop"
        return "summary" if name.startswith("summary.") else super().group_of(name)

    def setup(self, stage: str) -> None:
        """Check that the blocks are long enough."""
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        tokens = getattr(data, "block_size", None)
        if tokens is not None and "gold" not in data.gives:
            self.cutting.substeps(tokens, seeds.generator(self.seed, 0))

    def as_model(self) -> AutoCompressorModel:
        """The same weights under the names of the paper's code: `compress_context`, `generate`, `save_pretrained`."""
        ours = self.compressor
        return AutoCompressorModel(
            self.backbone, self.summary, ours.segment_gradient_checkpointing, ours.truncate_bptt_segments
        )

    # ------------------------------------------------------------------ training

    def substeps(self, batch: Batch) -> Sequence[Callable[[], StepOutput]]:
        """See `Method`: one piece for each substep of the block; the soft prompt goes from one to the next."""
        if self.full:
            return [lambda: self.step(batch)]
        if isinstance(self.summary, VariableSummary):
            self.summary.trains_stops = not self.stops_from or self._done() >= self.stops_from
            self.summary.draws_stops = self.stop_draws > 0
            if self.stop_draws:
                batch = {key: value.repeat_interleave(self.stop_draws, 0) for key, value in batch.items()}
        # The same lengths on every rank and in every batch that is accumulated.
        draws = seeds.generator(self.seed, self.trainer.global_step)
        tokens = batch["input_ids"].shape[1]
        substeps = halves(tokens) if "halves" in batch else self.cutting.substeps(tokens, draws)
        readings = substep_readings(self.compressor, substeps, batch["input_ids"], batch["attention_mask"])
        return [
            lambda r=read, s=substep: self._loss(r(), batch["labels"][:, s.columns], 1 / len(substeps))  # type: ignore[misc]
            for read, substep in zip(readings, substeps)
        ]

    def _done(self) -> float:
        """Share of the training steps that are done."""
        return float(self.trainer.global_step / self.trainer.estimated_stepping_batches)

    def step(self, batch: Batch) -> StepOutput:
        """Negative log-likelihood of a whole block, read in equal segments."""
        return self._loss(*self._read(batch))

    def _read(self, batch: Batch, soft: bool | None = None) -> tuple[Reading, torch.Tensor]:
        """A whole block in equal segments, and its labels."""
        tokens = batch["input_ids"].shape[1]
        lengths = [tokens] if self.full else self.eval_lengths(tokens)
        used = slice(tokens - sum(lengths), tokens)
        reading = self.compressor.read(
            batch["input_ids"][:, used],
            batch["attention_mask"][:, used],
            segment_lengths=lengths,
            soft=soft,
            generator=[seeds.generator(number) for number in batch["id"].tolist()],
        )
        return reading, batch["labels"][:, used]

    def on_validation_epoch_start(self) -> None:
        """Forget the summaries of an earlier validation."""
        if isinstance(self.summary, VariableSummary):
            self._lengths = Lengths(self.summary.max_len)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """See `Method`; the length of variable summaries is measured with soft gates too."""
        hard, labels = self._read(batch)
        self.validated(self._loss(hard, labels))
        if self._lengths is not None:
            self._lengths.add(self._read(batch, soft=True)[0].reports, hard.reports)

    def on_validation_epoch_end(self) -> None:
        """See `Method`; log expected and real lengths, and probabilities of stopping."""
        super().on_validation_epoch_end()
        if self._lengths is None:
            return
        expected, hard, stop = (
            self.summed(n).cpu() for n in (self._lengths.expected, self._lengths.hard, self._lengths.stop)
        )
        self.log("val/expected_vectors", (expected[0] / expected[1].clamp(min=1)).float())
        most = torch.arange(len(hard), dtype=hard.dtype)
        self.log("val/vectors", ((hard * most).sum() / hard.sum().clamp(min=1)).float())
        self.log_histogram("val/vectors_of_segment", hard, [n - 0.5 for n in range(len(hard) + 1)])
        self.log_histogram("val/stop_probability", stop, [n / len(stop) for n in range(len(stop) + 1)])

    def eval_lengths(self, tokens: int) -> list[int]:
        """Lengths of the segments in which evaluations read a block."""
        return [length for substep in self.cutting.substeps(tokens) for length in substep.segment_lengths]

    def _loss(self, reading: Reading, labels: torch.Tensor, share: float = 1.0) -> StepOutput:
        losses, scored = self.compressor.losses(reading, labels)
        total, count = losses.sum(), scored.sum()
        if any(report.chance is not None for report in reading.reports):
            taught = stop_loss(reading, losses, scored, self.stop_draws)
            total = total + (taught - taught.detach())
        metrics = {}
        if reading.reports:
            lengths = [report.expected_length.detach()[report.active] for report in reading.reports]
            every = torch.cat(lengths)
            metrics = {"vectors": every.sum() / max(len(every), 1)}
        if self.substep_loss == "mean" and self.training:
            # The base divides by the sum of counts, which is 1 for each batch.
            return StepOutput(total / count.clamp(min=1) + reading.penalty, torch.full_like(total, share), metrics)
        return StepOutput(total + reading.penalty * count, count, metrics)

    # ------------------------------------------------------------------ evaluation

    @torch.no_grad()
    def records(self, batch: Batch) -> list[Record]:
        """Scores of the last segment after 0, 1, 2 ... summarised segments and after the full text.

        A batch with `gold` holds queries about demonstrations instead; see `kvc.data.demonstrations`.
        """
        tokens = batch["input_ids"].shape[1]
        if "gold" in batch:
            lengths = even(tokens, self.cutting.total)
            found = self._by_arm(choose, batch, lengths, choice_arms(self.full, self.compresses))
        else:
            lengths = self.eval_lengths(tokens)
            variable = isinstance(self.summary, VariableSummary)
            found = self._by_arm(last_segment, batch, lengths, arms_of(lengths, self.full, self.compresses, variable))
        records = []
        for row, number in enumerate(batch["id"].tolist()):
            arms = {name: rows[row] for name, rows in found.items()}
            record: Record = {"id": number, "arms": arms}
            if "gold" in batch:
                record["correct"] = arms[METHOD]["correct"]
            else:
                record["loss"] = arms[METHOD]["nll"] / max(arms[METHOD]["tokens"], 1)
                record["segments"] = arms[METHOD]["segments"]
                record["arms"] = {n: {k: v for k, v in a.items() if k != "segments"} for n, a in arms.items()}
            records.append(record)
        return records

    def _by_arm(self, score: Any, batch: Batch, lengths: list[int], arms: dict[str, Arm]) -> dict[str, list[Record]]:
        found = {}
        limit = self.compressor.stack.positions.limit
        tokens = batch["input_ids"].shape[1] + (batch["option_ids"].shape[-1] if "option_ids" in batch else 0)
        for name, arm in arms.items():
            if name != METHOD and arm.full and limit is not None and tokens > limit:
                continue
            if not arm.base:
                found[name] = score(self.compressor, batch, lengths, arm)
            elif self.base_arms:
                with self._base() as compressor:
                    found[name] = score(compressor, batch, lengths, arm)
        for held in (scores for rows in found.values() for scores in rows):
            rows = {key: value for key, value in held.items() if key.startswith("kv_tokens_")}
            held |= {key.replace("tokens", "bytes"): value * self._row_bytes for key, value in rows.items()}
        return found

    @cached_property
    def _row_bytes(self) -> float:
        """Bytes of one row of KV in all layers and heads, as the model holds it."""
        ids = torch.zeros(1, 2, dtype=torch.int64, device=self.backbone.device)
        return cache_bytes(decoder(self.backbone)(ids, use_cache=True).past_key_values) / 2

    @contextmanager
    def _base(self) -> Iterator[Compressor]:
        """The base model as it was before training."""
        if self.base.lora is None and self._plain is None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.seed)
                model = self._loaded(self.max_position_embeddings).eval()
            self._plain = Compressor(model, FixedSummary(model, 0))
        if self._plain is None:
            self._plain = Compressor(self.backbone, FixedSummary(self.backbone, 0))
        self._plain.model.to(self.device)
        with self.backbone.disable_adapter() if self.base.lora is not None else nullcontext():
            yield self._plain

    def summarize(self, records: Sequence[Record]) -> Summary:
        """Loss of the last segment by context and what is recovered of it, or accuracy; rows of KV."""
        return (summarize_choices if "correct" in records[0] else summarize)(records, self.seed)


def _positions(model: Any) -> int:
    config = model.config.get_text_config(decoder=True)
    return int(getattr(config, "max_position_embeddings", None) or 2**31)
