"""Settings of a compressor that do not fit together, and the reader that those ask for which do."""

from typing import Any

from transformers import PreTrainedModel

from kvc.core.backbone import Backbone
from kvc.errors import UserError
from kvc.methods.squad.anchor import Anchors
from kvc.methods.squad.assembly import Positions
from kvc.methods.squad.baselines import CONTROLS
from kvc.methods.squad.budget import Budget
from kvc.methods.squad.interface import SlotCompressor
from kvc.methods.squad.readers import AnchorReader, Reader, SlotReader, TextReader, check_anchors
from kvc.methods.squad.source import EMBEDDINGS, Source

TEACHING = frozenset({"gold.teacher", "own.teacher"})


def check_control(
    mode: str, lora: bool, positions: Positions, compressor: Any, source: Any, teacher: Any, train_budget: Any
) -> None:
    """Refuse settings that a control does not have.

    Raises:
        UserError: If there is one.
    """
    given = {"compressor": compressor, "source": source, "teacher": teacher, "train_budget": train_budget}
    given["positions"] = positions if positions == "spread" else None
    for name, value in given.items():
        if value is not None:
            raise UserError(f"model.{name}: has no effect with model.mode {mode}")
    if not lora:
        raise UserError(f"model.backbone.lora: the control '{mode}' trains a LoRA, give at least its rank")


def check_lessons(budget: Budget, scope: str) -> None:
    """Refuse lessons for which contexts cannot be shortened.

    Args:
        budget: Of training steps.
        scope: What is compressed, see `kvc.data.squad.Squad`.

    Raises:
        UserError: If so.
    """
    if scope == "prompt":
        raise UserError("model.lessons: would cut the question off a prompt that is compressed whole, use null")
    if getattr(budget, "policy", None) == "refuse":
        raise UserError("model.lessons: shorten texts, which the policy 'refuse' of the budget forbids; use null")


def make_reader(
    compressor: SlotCompressor | Anchors | None,
    source: Source | None,
    positions: Positions,
    base: Backbone,
    model: PreTrainedModel,
    max_length: int,
    bos: int | None,
) -> Reader:
    """The way of reading that a compressor needs.

    Args:
        compressor: None for a control.
        source: What it reads; contextual states if None.
        positions: Where slots stand.
        base: Settings of the model.
        model: The model.
        max_length: Tokens of a piece.
        bos: Token that texts begin with, if any.

    Raises:
        UserError: If settings do not fit.
    """
    lora = base.lora is not None
    if compressor is None:
        return TextReader()
    if isinstance(compressor, Anchors):
        if source is not None:
            raise UserError("model.source: has no effect with anchors, which are the model's own keys and values")
        check_anchors(model, positions, base.gradient_checkpointing, lora)
        return AnchorReader(compressor)
    source = source or Source()
    source.check(model)
    if source.states == EMBEDDINGS and not source.frozen:
        raise UserError("model.source.frozen: embeddings are never trained, leave it true")
    if not source.frozen and not lora:
        raise UserError("model.backbone.lora: a source that is not frozen trains a LoRA, give at least its rank")
    return SlotReader(source, compressor, max_length, positions, bos)


def check_settings(
    mode: str, needs: frozenset[str], reader: Reader, base: Backbone, frozen_decoder: bool, teacher: bool
) -> None:
    """Refuse losses, a frozen decoder or a teacher that go with nothing else.

    Args:
        mode: `compress` or a control.
        needs: What the losses look at.
        reader: How contexts are read.
        base: Settings of the model.
        frozen_decoder: Answers are given without the adapters.
        teacher: Another model teaches.

    Raises:
        UserError: If so.
    """
    if isinstance(reader, AnchorReader | TextReader) and "slots" in needs:
        raise UserError("model.losses: a contrastive term needs slots, which neither anchors nor controls have")
    if mode in CONTROLS and TEACHING & needs:
        raise UserError(f"model.losses: the control '{mode}' learns from answers, not from a teacher")
    if frozen_decoder and base.lora is not None:
        adapts = isinstance(reader, AnchorReader) or (isinstance(reader, SlotReader) and not reader.source.frozen)
        if not adapts:
            raise UserError(
                "model.frozen_decoder: nothing would train the LoRA, set model.source.frozen: false or"
                " model.backbone.lora: null"
            )
        if base.gradient_checkpointing:
            # What is computed again in the backward pass would find the adapters on.
            raise UserError("model.frozen_decoder: does not go together with backbone.gradient_checkpointing")
    if teacher and not TEACHING & needs:
        raise UserError("model.teacher: has no effect, no term of model.losses learns from it")
