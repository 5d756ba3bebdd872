"""What a base model can do with the full context and with parts of it, before any method compresses anything."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from kvc.core import seeds
from kvc.core.backbone import Backbone
from kvc.core.evaluation import Evaluation
from kvc.core.module import Record
from kvc.core.results import Summary
from kvc.data.synthetic.tasks import TASKS
from kvc.methods.lm.arms import SHORTCUT
from kvc.methods.lm.grading import grade
from kvc.methods.lm.summary import summarize_arms
from kvc.methods.lm.teacher_forcing import score

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class TaskReport(Evaluation):
    """Every task by difficulty: greedy answers with the full context, and teacher-forced arms that see less.

    The arms are a window of the most recent tokens, random eviction, no context, and for reasoning an oracle that
    keeps the tokens that are still needed beside a window of the same size. `shortcut` is not a model but what a
    known trick answers.

    Args:
        backbone: The model to measure.
        max_new_tokens: Limit of greedy answers.
        greedy: Also generate; false measures only the arms.
        seed: Seed of the bootstrap and of random eviction.
    """

    needs: ClassVar[tuple[str, ...]] = ("items",)
    headline: ClassVar[tuple[str, ...]] = tuple(f"exact_match/{task}" for task in TASKS)

    def __init__(
        self,
        backbone: Backbone | None = None,
        max_new_tokens: int = 640,
        greedy: bool = True,
        seed: int = seeds.DEFAULT_SEED,
    ) -> None:
        super().__init__(seed)
        self.base = backbone or Backbone()
        self.tokenizer = self.base.load_tokenizer()
        self.backbone = self.base.load().eval()
        self.max_new_tokens = max_new_tokens
        self.greedy = greedy

    def base_identity(self) -> dict[str, Any]:
        """Name and hash of the measured weights."""
        return {"name": self.base.pretrained, "hash": self.base.identity()}

    def records(self, batch: Any) -> list[Record]:
        """Greedy completions, and what each arm got right of the gold answer."""
        items = batch["items"]
        examples = [item.example for item in items]
        arms = score(self.backbone, self.tokenizer, examples, [item.id for item in items], self.seed)
        records: list[Record] = [
            {"id": item.id, "task": item.task, "level": item.level, "gold": item.example.gold} for item in items
        ]
        for record, example, scores in zip(records, examples, arms):
            record["arms"] = {name: outcome._asdict() for name, outcome in scores.items()}
            if example.shortcut is not None:
                record["arms"][SHORTCUT] = {"exact": example.shortcut == example.gold}
        if self.greedy:
            graded = {r["id"]: r for r in grade(self.backbone, self.tokenizer, items, self.max_new_tokens)}
            for record in records:
                answer = graded.get(record["id"], {})
                record |= {key: answer[key] for key in ("completion", "correct") if key in answer}
        return records

    def summarize(self, records: Sequence[Record]) -> Summary:
        """Metrics by task and by difficulty: the full context is the method, the arms stand beside it."""
        return summarize_arms(records, self.seed)

    def figures(self, records: Sequence[Record], summary: Summary) -> "dict[str, Figure]":
        """A panel for each task: exact match of every arm, a line for each difficulty."""
        from kvc.methods.lm.picture import arms_by_task

        levels: dict[str, list[str]] = {}
        for record in records:
            known = levels.setdefault(record["task"], [])
            if record["level"] not in known:
                known.append(record["level"])
        return {"arms": arms_by_task(summary, levels)}
