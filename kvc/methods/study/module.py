"""A study as a configuration: `python -m kvc predict --config configs/study/tiny.yaml --name NAME`."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from kvc.core import seeds
from kvc.core.backbone import Backbone
from kvc.core.datamodule import KvcDataModule, Rows, Split
from kvc.core.evaluation import Evaluation
from kvc.core.files import digest
from kvc.core.module import Record
from kvc.errors import UserError
from kvc.eviction.policy import Policy
from kvc.methods.study.documents import Document, read_documents
from kvc.methods.study.folder import MemoryFolder
from kvc.methods.study.plan import plan
from kvc.methods.study.settings import StudySettings
from kvc.methods.study.study import Study


class StudyRun(Evaluation):
    """Reads all documents into one memory; a record for each document.

    Args:
        output: Folder of the memory.
        backbone: The model.
        settings: How documents are studied.
        policy: Which rows stay; null takes R-KV with the window of the settings.
        recompute: Replace what the folder holds.
        seed: Of the summaries.
    """

    needs: ClassVar[tuple[str, ...]] = ("documents",)

    def __init__(
        self,
        output: str,
        backbone: Backbone | None = None,
        settings: StudySettings | None = None,
        policy: Policy | None = None,
        recompute: bool = False,
        seed: int = seeds.DEFAULT_SEED,
    ) -> None:
        super().__init__(seed)
        self.base = backbone or Backbone()
        self.output, self.policy, self.recompute = output, policy, recompute
        self.settings = dataclasses.replace(settings or StudySettings(), seed=seed)
        self.tokenizer = self.base.load_tokenizer()
        self.backbone = self.base.load().eval()

    def base_identity(self) -> dict[str, Any]:
        """Name and hash of the model."""
        return {"name": self.base.pretrained, "hash": self.base.identity()}

    def records(self, batch: Any) -> list[Record]:
        """Study all documents; one record for each reading of one.

        Raises:
            UserError: If several processes share the documents: what is read depends on what was read before.
        """
        if self.trainer.world_size > 1:
            raise UserError("trainer.devices: documents are read one after the other, so a study takes one device")
        planned = plan(self.backbone, self.tokenizer, batch["documents"], self.settings, self.policy)
        study = Study(self.backbone, planned, self.base)
        said = study.run(MemoryFolder(Path(self.output)), self.recompute)["user"]["study"]
        written = {summary["document"]: summary["text"] for summary in said["summaries"]}
        return [
            {"id": number, **document, "summary": written.get(number + 1)}
            for number, document in enumerate(said["documents"])
        ]


class StudyDocuments(KvcDataModule):
    """Documents to study, as one batch; every split but `test` is empty.

    Batch: `documents`, a list of `Document`.

    Args:
        path: JSON list or JSONL file.
        limit: Only the first so many; 0 takes all.
        reverse: Turn their order round.
        seed: Of the run.
    """

    gives: ClassVar[tuple[str, ...]] = ("documents",)

    def __init__(self, path: str, limit: int = 0, reverse: bool = False, seed: int = seeds.DEFAULT_SEED) -> None:
        self.path = path
        self.documents: list[Document] = read_documents(path, limit or None, reverse)
        super().__init__(None, len(self.documents), shuffle=False, seed=seed)

    def has_split(self, split: Split) -> bool:
        """Only `test` has rows."""
        return split == "test"

    def dataset(self, split: Split) -> Any:
        """The documents."""
        return Rows(self.documents if split == "test" else [])

    def collate(self, split: Split) -> Callable[[list[Any]], Any] | None:
        """A list, as it is."""
        return lambda rows: {"documents": rows}

    def data_hash(self) -> str:
        """Name of the contents."""
        return digest([document.body for document in self.documents])

    def describe(self) -> dict[str, Any]:
        """Where the documents come from."""
        return {"source": self.path, "documents": len(self.documents)}
