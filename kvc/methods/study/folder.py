"""The folder of a studied memory.

`memory.safetensors`     the memory, with everything about the study as JSON in its header: the one truth
`metadata.json`          that JSON, to be read by people
`unfinished.safetensors` the memory after the last document of a study that is not finished
`document_0001.safetensors` ... the memory after each document, where that was asked for
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from kvc.cache.memory import KVMemory
from kvc.cache.store import load_memory, read_metadata, save_memory
from kvc.core.files import write_json
from kvc.errors import UserError

MEMORY, METADATA, UNFINISHED = "memory.safetensors", "metadata.json", "unfinished.safetensors"


@dataclass(frozen=True)
class MemoryFolder:
    """Paths of one studied memory.

    Attributes:
        path: The folder, which need not exist.
    """

    path: Path

    @property
    def memory(self) -> Path:
        """The finished memory."""
        return self.path / MEMORY

    @property
    def unfinished(self) -> Path:
        """The memory of a study that goes on."""
        return self.path / UNFINISHED

    def document(self, number: int) -> Path:
        """The memory after so many documents."""
        return self.path / f"document_{number:04}.safetensors"

    def stage(self, document: int | None = None) -> Path:
        """The file of the finished memory, or of that after a document.

        Raises:
            UserError: If it is not there.
        """
        path = self.memory if document is None else self.document(document)
        if path.is_file():
            return path
        if document is not None and self.memory.is_file():
            raise UserError(f"doc_id: {path} is not there; study with --every_document keeps one for each document")
        if self.unfinished.is_file():
            raise UserError(f"{self.path}: the study is not finished; the same study command goes on with it")
        raise UserError(f"{self.path}: holds no studied memory, there is no {MEMORY}")

    def state(self, identity: dict[str, Any], recompute: bool) -> Path | None:
        """The file that a study goes on from, finished or not; None where nothing is there.

        Args:
            identity: What decides the outcome of the study.
            recompute: Forget what is there.

        Raises:
            UserError: If the folder holds something else, or the memory of another study.
        """
        if recompute:
            self.clear()
        path = next((path for path in (self.memory, self.unfinished) if path.is_file()), None)
        if path is None:
            return None
        try:
            theirs = study_of(path)["identity"]
        except UserError as error:
            raise UserError(f"{error}; --recompute makes it anew") from error
        if theirs == identity:
            return path
        keys = sorted(key for key in theirs.keys() | identity.keys() if theirs.get(key) != identity.get(key))
        phrases = [f"{key} is {theirs.get(key)!r} there and {identity.get(key)!r} here" for key in keys]
        raise UserError(
            f"{self.path}: holds the memory of another study ({'; '.join(phrases)}); choose another --output, or "
            "replace it with --recompute"
        )

    def clear(self) -> None:
        """Remove what a study has written, and what was half-written when one was killed."""
        for path in [self.memory, self.path / METADATA, self.unfinished, *self.path.glob("document_*.safetensors")]:
            path.unlink(missing_ok=True)
        self.sweep()

    def sweep(self) -> None:
        """Remove temporary files of a study that was killed while it wrote."""
        for name in (MEMORY, METADATA, UNFINISHED, "document_*.safetensors"):
            for path in self.path.glob(f".{name}.*.tmp"):
                path.unlink(missing_ok=True)

    def save(self, memory: KVMemory, model: PreTrainedModel, study: dict[str, Any], finished: bool) -> Path:
        """Write the memory after a document.

        Args:
            memory: Of one row.
            model: Whose it is.
            study: Everything about the study so far, as JSON.
            finished: Whether it was the last document.

        Returns:
            The file.
        """
        if study["identity"]["every_document"]:
            save_memory(memory, self.document(study["done"]), model, {"study": study})
        path = self.memory if finished else self.unfinished
        save_memory(memory, path, model, {"study": study})
        if finished:
            self.finish()
        return path

    def finish(self) -> dict[str, Any]:
        """Write what people read, and drop what a finished study does not need; returns the metadata."""
        metadata = read_metadata(self.memory)
        study = metadata["user"]["study"]
        shown = {
            **{
                key: metadata[key]
                for key in ("model", "next_position", "rotation", "tokens", "dtype", "versions", "content")
            },
            **study,
        }
        write_json(self.path / METADATA, shown)
        self.unfinished.unlink(missing_ok=True)
        return metadata


def study_of(path: Path) -> dict[str, Any]:
    """What a memory's file says about its study.

    Raises:
        UserError: If the file is damaged, or no study wrote it.
    """
    study = read_metadata(path)["user"].get("study")
    if not isinstance(study, dict) or "identity" not in study:
        raise UserError(f"{path}: a KV memory, but not one that kvc study wrote")
    return study


def load_studied(path: Path, model: PreTrainedModel) -> tuple[KVMemory, dict[str, Any]]:
    """A studied memory and everything about its study.

    Raises:
        UserError: If the file is damaged, of another model, or its rows do not fit its token ids.
    """
    study = study_of(path)
    memory = load_memory(path, model)
    if memory.rotated.mode == "keep" and int(memory.next_position[0]) != len(study["token_ids"]):
        raise UserError(f"{path}: damaged: its rows and its token ids do not end at the same position")
    return memory, study
