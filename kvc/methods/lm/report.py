"""What a base model can do with the full context, before anything is compressed."""

from collections.abc import Sequence
from typing import Any, ClassVar

from kvc.core import seeds
from kvc.core.backbone import Backbone
from kvc.core.evaluation import Evaluation
from kvc.core.module import Record
from kvc.core.results import Summary
from kvc.methods.lm.grading import grade, summarize


class TaskReport(Evaluation):
    """Greedy exact match of a base model on held-out items, by task and difficulty.

    Args:
        backbone: The model to measure.
        max_new_tokens: Limit of greedy answers.
        seed: Seed of the bootstrap.
    """

    needs: ClassVar[tuple[str, ...]] = ("items",)

    def __init__(
        self, backbone: Backbone | None = None, max_new_tokens: int = 640, seed: int = seeds.DEFAULT_SEED
    ) -> None:
        super().__init__(seed)
        self.base = backbone or Backbone()
        self.tokenizer = self.base.load_tokenizer()
        self.backbone = self.base.load()
        self.max_new_tokens = max_new_tokens

    def base_identity(self) -> dict[str, Any]:
        """Name and hash of the measured weights."""
        return {"name": self.base.pretrained, "hash": self.base.identity()}

    def records(self, batch: Any) -> list[Record]:
        """Greedy completions of the prompts, graded."""
        return grade(self.backbone, self.tokenizer, batch["items"], self.max_new_tokens)

    def summarize(self, records: Sequence[Record]) -> Summary:
        """Exact match by task and difficulty."""
        return summarize(records, self.seed)
