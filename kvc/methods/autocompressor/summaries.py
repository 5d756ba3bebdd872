"""Ways of summarising, as configurations name them."""

from dataclasses import dataclass
from typing import Any, Literal, Protocol

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvc.methods.autocompressor.controls import Controls, OwnControls, TableControls
from kvc.methods.autocompressor.fixed import FixedSummary
from kvc.methods.autocompressor.stopping import Gate, Rule, Stopping
from kvc.methods.autocompressor.summary import Summary
from kvc.methods.autocompressor.variable import Insertion, VariableSummary


class SummarySettings(Protocol):
    """A way of summarising, without the weights."""

    def build(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Summary:
        """The summary part for a base model that has its weights."""
        ...


@dataclass(frozen=True)
class Fixed:
    """Summary vectors of a fixed number.

    Args:
        summary_length: Summary vectors of a segment, kappa; 0 compresses nothing, which makes the control that is tuned
            on the same segments without context.
        accumulate_summary: Vectors of all segments stay; false keeps those of the last one.
    """

    summary_length: int = 50
    accumulate_summary: bool = True

    def build(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Summary:
        """See `SummarySettings`."""
        return FixedSummary(model, self.summary_length, self.accumulate_summary)


@dataclass(frozen=True)
class Variable:
    """Summary vectors of a number that the model chooses.

    Args:
        compression_max_len: Most vectors of a segment.
        compression_lambda: Weight of the length penalty; at 0 nothing makes summaries short.
        compression_alpha: How much the vectors before a segment count as its length, in the penalty
            lambda E[length] / (tokens + alpha m).
        compress_stop_threshold: At inference, stop where the probability of stopping exceeds it; null stops greedily.
        stop_mode: Rule of inference; null: `threshold` if there is one, else `greedy`.
        min_length: Vectors of a segment at least, at inference.
        gate: How training weighs vectors by the probability that the loop gets to them.
        step_embeddings: Add a learned embedding to the input of each step of the loop. Without, a loop may go round
            between two states, and only its first vectors tell anything.
        insertion: How `<sum>` gets behind a segment.
        control_tokens: `own`: beside the tables of the base model; `vocabulary`: rows of the tables, for a tokenizer
            that has `<sum>` and `<eoc>`. Both are trained whatever else is.
        stop_head: For `own`: `binary` stops by a logistic regression, `vocabulary` by one more token.
    """

    compression_max_len: int = 8
    compression_lambda: float = 0.0
    compression_alpha: float = 1.0
    compress_stop_threshold: float | None = None
    stop_mode: Rule | None = None
    min_length: int = 0
    gate: Gate = "after"
    step_embeddings: bool = False
    insertion: Insertion = "append"
    control_tokens: Literal["own", "vocabulary"] = "own"
    stop_head: Literal["binary", "vocabulary"] = "binary"

    def build(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Summary:
        """See `SummarySettings`."""
        rule: Rule = self.stop_mode or ("greedy" if self.compress_stop_threshold is None else "threshold")
        own = self.control_tokens == "own"
        table: Any = model.get_input_embeddings()
        controls: Controls = OwnControls(model, self.stop_head) if own else _of_tables(model, tokenizer)
        return VariableSummary(
            controls,
            self.compression_max_len,
            self.compression_lambda,
            self.compression_alpha,
            self.gate,
            Stopping(rule, self.compress_stop_threshold, self.min_length),
            self.insertion,
            table.weight.shape[1] if self.step_embeddings else None,
        )


def _of_tables(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> TableControls:
    """Control tokens in the tables of the base model, with trained copies of their rows where tables are frozen."""
    controls = TableControls.of(tokenizer)
    table: Any = model.get_input_embeddings()
    if not table.weight.requires_grad:
        controls.train_rows(model)
    return controls
