"""Summaries as keys of a `config.json` and tensors beside those of the base model, and back.

| key | meaning |
|---|---|
| `summary_length`, `accumulate_summary` | see `FixedSummary` |
| `segment_gradient_checkpointing` | see `Compressor` |
| `sum_token_id`, `eoc_token_id` | rows of the base model's tables; with them, summaries have a variable length |
| `compression_max_len`, `compression_lambda`, `compression_alpha` | see `VariableSummary` |
| `compress_stop_threshold` | see `Stopping`; null stops where `<eoc>` is the most likely token |
| `truncate_bptt_segments` | see `Compressor` |
| `compression_gate`, `compression_insertion` | see `VariableSummary`; absent in files of others: `after` and `given` |
| `compression_sum_rival` | see `TableControls`; absent in files of others: true |
| `compression_min_len` | see `Stopping`; absent in files of others: 0 |
"""

from typing import Any

import torch

from kvc.errors import UserError
from kvc.methods.autocompressor.checkpoint import SUMMARY, Loaded, base_of, merged_state
from kvc.methods.autocompressor.compressor import Compressor
from kvc.methods.autocompressor.controls import Controls, OwnControls, TableControls
from kvc.methods.autocompressor.fixed import FixedSummary
from kvc.methods.autocompressor.stopping import Stopping
from kvc.methods.autocompressor.summary import Summary
from kvc.methods.autocompressor.variable import VariableSummary


def summary_of(loaded: Loaded, length: int | None, accumulate: bool | None) -> Summary:
    """The summary that a folder describes.

    Args:
        loaded: The folder.
        length: Summary tokens; None takes what the configuration says.
        accumulate: Vectors of all segments stay; None takes what the configuration says, or else true.

    Raises:
        UserError: If the number of summary tokens is unknown, or not that of the folder.
    """
    config: Any = loaded.backbone.config
    if getattr(config, "sum_token_id", None) is not None and length is None:
        threshold = getattr(config, "compress_stop_threshold", None)
        least = getattr(config, "compression_min_len", 0)
        return VariableSummary(
            TableControls(config.sum_token_id, config.eoc_token_id, getattr(config, "compression_sum_rival", True)),
            config.compression_max_len,
            getattr(config, "compression_lambda", 0.0),
            getattr(config, "compression_alpha", 1.0),
            getattr(config, "compression_gate", "after"),
            Stopping("greedy" if threshold is None else "threshold", threshold, least),
            getattr(config, "compression_insertion", "given"),
        )
    kappa = getattr(config, "summary_length", None) if length is None else length
    if kappa is None:
        raise UserError("summary_length: the config.json of this model has none, so give the number of summary tokens")
    table = loaded.embed_summary
    if table is not None and len(table) != kappa:
        raise UserError(f"summary_length: the checkpoint has {len(table)} summary tokens, not {kappa}")
    accumulate = getattr(config, "accumulate_summary", True) if accumulate is None else accumulate
    summary = FixedSummary(loaded.backbone, int(kappa), bool(accumulate))
    if table is not None:
        with torch.no_grad():
            summary.embed_summary.weight.copy_(table)
    return summary


def compressor_settings(config: Any, summary: Summary) -> dict[str, Any]:
    """Arguments of `Compressor` that a configuration names."""
    saving = bool(getattr(config, "segment_gradient_checkpointing", False))
    uses = getattr(config, "truncate_bptt_segments", None) if isinstance(summary, VariableSummary) else None
    # Numbers below 1 mean that the graph is never cut.
    return {"segment_gradient_checkpointing": saving, "truncate_bptt_segments": uses if uses and uses > 0 else None}


def parts_of(compressor: Compressor) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors and keys of the configuration that describe a summary.

    Raises:
        UserError: If the layout cannot hold it.
    """
    summary, dtype = compressor.summary, base_of(compressor.model).dtype
    fields: dict[str, Any] = {"segment_gradient_checkpointing": compressor.segment_gradient_checkpointing}
    if isinstance(summary, FixedSummary):
        fields |= {"summary_length": summary.length, "accumulate_summary": summary.accumulate}
        if getattr(compressor.model.config, "sum_token_id", None) is not None:
            fields["sum_token_id"] = None
        table = summary.embed_summary.weight.detach().to(dtype)
        return ({SUMMARY: table} if summary.length else {}), fields
    if not isinstance(summary, VariableSummary):
        raise UserError(f"{type(summary).__name__}: the layout of the published AutoCompressors cannot hold it")
    stopping, controls = summary.stopping, summary.controls
    if stopping.rule == "sample":
        raise UserError("stop_mode: the layout of the published AutoCompressors cannot hold sample")
    if summary.steps is not None:
        raise UserError("step_embeddings: the layout of the published AutoCompressors cannot hold them")
    fields |= {
        "sum_token_id": controls.sum_token_id,
        "eoc_token_id": controls.eoc_token_id,
        "compression_max_len": summary.max_len,
        "compression_lambda": summary.lam,
        "compression_alpha": summary.alpha,
        "compress_stop_threshold": stopping.threshold,
        "truncate_bptt_segments": compressor.truncate_bptt_segments or 0,
        "compression_gate": summary.gate,
        "compression_insertion": summary.insertion,
        "compression_min_len": stopping.min_length,
        "compression_sum_rival": getattr(controls, "rival", False),
    }
    if isinstance(controls, OwnControls):
        if controls.head != "vocabulary":
            raise UserError("stop_head: the layout of the published AutoCompressors cannot hold binary")
        fields["vocab_size"] = controls.eoc_token_id + 1
        return _with_rows(compressor, controls, controls.sum_embedding, controls.eoc_weight), fields
    if isinstance(controls, TableControls) and controls.sum_row is not None and controls.eoc_row is not None:
        return _with_rows(compressor, controls, controls.sum_row, controls.eoc_row), fields
    return {}, fields


def _with_rows(
    compressor: Compressor, controls: Controls, sum_row: torch.Tensor, eoc_row: torch.Tensor
) -> dict[str, torch.Tensor]:
    """The tables of the base model with rows `[D]` for the control tokens.

    `<sum>` is only read and `<eoc>` only predicted, so tables that are not tied need one row each.
    """
    base: Any = base_of(compressor.model)
    state, names = merged_state(compressor.model), {module: name for name, module in base.named_modules()}
    inside, outside = base.get_input_embeddings(), base.get_output_embeddings()
    # Gemma's table scales what it holds.
    rows = {inside: (controls.sum_token_id, sum_row / float(getattr(inside, "embed_scale", 1.0)))}
    rows[outside] = (controls.eoc_token_id, eoc_row)
    tied = inside.weight.data_ptr() == outside.weight.data_ptr()
    tables = {}
    for module in (inside, outside):
        table = state[f"{names[module]}.weight"].detach()
        missing = max(0, controls.eoc_token_id + 1 - len(table))
        table = torch.cat([table, table.new_zeros(missing, table.shape[1])])
        for owner, (token, row) in rows.items():
            if tied or owner is module:
                table[token] = row.detach().to(table)
        tables[f"{names[module]}.weight"] = table
    return tables
