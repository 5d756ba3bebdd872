"""Embeddings by a pretrained sentence-transformers model."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from kvc.data.clustering.embedder import Embedder, Vectors, unit_rows
from kvc.errors import UserError, first_sentence


class SentenceEmbedder(Embedder):
    """Any sentence-transformers model that needs no code of its own.

    Args:
        model: Hub id, or a folder.
        prompt: Name of one of the model's prompts, put before every question.
        batch_size: Questions embedded together.
        device: Where it runs; a GPU if there is one when None.
    """

    kind: ClassVar[str] = "sentence-transformers"

    def __init__(self, model: str, prompt: str | None = None, batch_size: int = 32, device: str | None = None) -> None:
        self.model, self.prompt, self.batch_size, self.device = model, prompt, batch_size, device

    def settings(self) -> dict[str, Any]:
        """What the vectors depend on."""
        return {"model": self.model, "prompt": self.prompt}

    def fit(self, questions: Sequence[str]) -> Vectors:
        """Embed the questions; there is nothing to learn."""
        return self.embed(questions)

    def embed(self, questions: Sequence[str]) -> Vectors:
        """Embed questions.

        Raises:
            UserError: If the package is not installed, or the model cannot be loaded without code of its own.
        """
        vectors = self._loaded.encode(
            list(questions), prompt_name=self.prompt, batch_size=self.batch_size, show_progress_bar=False
        )
        return unit_rows(vectors)

    def save(self, folder: Path) -> None:
        """Nothing is learned: the name of the model says all."""

    def restore(self, folder: Path) -> None:
        """Nothing is learned."""

    @cached_property
    def _loaded(self) -> Any:
        try:
            from sentence_transformers import SentenceTransformer
        except ModuleNotFoundError:
            raise UserError(
                f"--embeddings {self.model} needs sentence-transformers: pip install -e '.[embeddings]'"
            ) from None
        try:
            loaded = SentenceTransformer(self.model, device=self.device, trust_remote_code=False)
        except Exception as error:  # a dozen kinds, all of which mean: not available
            raise UserError(
                f"--embeddings {self.model}: cannot be loaded without code of its own: {first_sentence(str(error))}"
            ) from error
        if self.prompt is not None and self.prompt not in loaded.prompts:
            raise UserError(f"--prompt {self.prompt}: {self.model} has {', '.join(loaded.prompts) or 'no prompts'}")
        return loaded
