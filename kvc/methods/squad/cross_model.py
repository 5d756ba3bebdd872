"""Compress in one model, answer with another."""

from pathlib import Path
from typing import Any

from kvc.core import seeds
from kvc.core.backbone import Backbone
from kvc.core.export import load_export
from kvc.core.files import digest, digest_files
from kvc.core.optim import Optim
from kvc.errors import UserError
from kvc.methods.squad.budget import Budget
from kvc.methods.squad.converter import ConvertedReader, Converter, Translation
from kvc.methods.squad.losses import Term
from kvc.methods.squad.module import ContextCompressor
from kvc.methods.squad.readers import SlotReader


class CrossModelConverter(ContextCompressor):
    """A trained compressor of one model feeds another: what is trained turns the slots of one into slots of the other.

    The reading model is frozen (or gets a LoRA), and by default learns from itself with the full text. Both models may
    have other widths and tokenizers. Slots of a `SlotCompressor` can be converted; anchors, which are keys and values,
    cannot.

    Args:
        compressor: Folder that `python -m kvc export` wrote for a `ContextCompressor`.
        backbone: Model that reads and answers; the tiny model without LoRA if null.
        hidden: Width of the converter's inner layer; that of the reading model if null.
        budget: Slots of a context; that of the compressor if null.
        losses: See `ContextCompressor`.
        teacher: See `ContextCompressor`.
        train_budget: See `ContextCompressor`.
        max_new_tokens: Limit of an answer.
        baselines: See `ContextCompressor`; those of the reading model.
        optim: Optimiser; groups: compressor (the converter), lora.
        seed: Seed of the run.
    """

    def __init__(
        self,
        compressor: str,
        backbone: Backbone | None = None,
        hidden: int | None = None,
        budget: Budget | None = None,
        losses: list[Term] | None = None,
        teacher: Backbone | None = None,
        train_budget: Budget | None = None,
        max_new_tokens: int = 32,
        baselines: list[str] | None = None,
        optim: Optim | None = None,
        seed: int = seeds.DEFAULT_SEED,
    ) -> None:
        foreign = trained_compressor(compressor)
        width = int(foreign.backbone.get_input_embeddings().weight.shape[1])

        def converter(target: int, rms: float) -> Any:
            return Converter(width, target, rms, hidden)

        super().__init__(
            backbone or Backbone(),
            compressor=converter,
            budget=budget or foreign.budget,
            losses=losses,
            teacher=teacher,
            train_budget=train_budget,
            max_length=foreign.max_length,
            max_new_tokens=max_new_tokens,
            baselines=baselines,
            optim=optim,
            seed=seed,
        )
        self._contents = contents(compressor)
        made: Any = self.compressor
        self.reader = ConvertedReader(foreign, Translation(self.tokenizer, foreign.tokenizer), made)

    def base_identity(self) -> dict[str, Any]:
        """Name of the reading model, and a hash of it and of the compressor."""
        return {"name": self.base.pretrained, "hash": digest([self._identity, self._contents])}


def contents(folder: str) -> str:
    """A name of the weights of an export, so that another one in its place is noticed."""
    return digest_files(*sorted(Path(folder).expanduser().glob("*.safetensors")))


def trained_compressor(folder: str) -> ContextCompressor:
    """Load a compressor whose slots can be converted.

    Raises:
        UserError: If there is none at the folder.
    """
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise UserError(f"model.compressor: there is no folder {path}, export a trained ContextCompressor to it")
    found = load_export(path)
    if not isinstance(found, ContextCompressor) or not isinstance(found.reader, SlotReader):
        raise UserError(f"model.compressor: {path} holds no ContextCompressor that makes slots")
    found.teacher = None
    return found.requires_grad_(False).eval()
