"""How much of a model's accuracy each eviction policy leaves at each budget."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from kvc.core import seeds
from kvc.core.attention import open_door
from kvc.core.backbone import Backbone
from kvc.core.evaluation import Evaluation
from kvc.core.module import Record
from kvc.core.results import Summary
from kvc.errors import UserError
from kvc.eviction.eviction import Eviction
from kvc.eviction.policy import Policy
from kvc.eviction.rkv import RKV
from kvc.eviction.triggers import Trigger
from kvc.generation.sampling import Greedy, Sampling
from kvc.methods.rkv.answering import answer
from kvc.methods.rkv.summary import FULL, NO_CONTEXT, arm_name, summarize

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class EvictionReport(Evaluation):
    """Answers every question with the full memory, without context, and under every policy at every budget.

    Each arm is decoded by itself, with rows really evicted; the full memory is the method that the arms are compared
    with, question by question.

    Args:
        backbone: The model.
        policies: Name in the report to policy; R-KV alone if not given.
        budgets: Rows per layer and KV head after a compression.
        trigger: When to compress; null waits for 128 rows on top of the budget. A `BudgetBuffer` without a budget of
            its own follows that of the arm.
        prefix: Tokens at the start that are never evicted.
        beta: Give later layers less, see `kvc.eviction.budgets.pyramid`; null gives all the same.
        max_new_tokens: Limit of each answer.
        samples: Answers to each question.
        rows: Answers that are decoded together at most; null decodes all of a batch together.
        temperature: Of the draws; 0 is greedy.
        top_p: Draw from the smallest set of tokens with this much probability, at a temperature above 0.
        seed: Of draws and bootstrap; random eviction has a seed of its own.
    """

    needs: ClassVar[tuple[str, ...]] = ("questions",)
    headline: ClassVar[tuple[str, ...]] = ("accuracy", "kv_tokens_peak", "kv_bytes_peak", "compressions", "new_tokens")

    def __init__(
        self,
        backbone: Backbone | None = None,
        policies: dict[str, Policy] | None = None,
        budgets: Sequence[int] = (128,),
        trigger: Trigger | None = None,
        prefix: int = 0,
        beta: float | None = None,
        max_new_tokens: int = 1024,
        samples: int = 1,
        rows: int | None = None,
        temperature: float = 0.0,
        top_p: float = 0.95,
        seed: int = seeds.DEFAULT_SEED,
    ) -> None:
        super().__init__(seed)
        if not budgets:
            raise UserError("budgets: there is none to measure")
        if samples > 1 and temperature == 0:
            raise UserError("samples: greedy answers to one question are all the same, set a temperature")
        if rows is not None and rows < 1:
            raise UserError(f"rows: must be at least 1, got {rows}")
        self.base = backbone or Backbone()
        self.arms = {
            arm_name(name, budget): Eviction(policy, budget, trigger, prefix, beta)
            for name, policy in (policies or {"rkv": RKV()}).items()
            for budget in budgets
        }
        self.tokenizer = self.base.load_tokenizer()
        self.backbone = self.base.load().eval()
        if any(arm.policy.needs_queries or arm.policy.needs_attention for arm in self.arms.values()):
            # Before anything is decoded or written: some attention kernels cannot be watched.
            open_door(self.backbone)
        self.max_new_tokens, self.samples, self.rows = max_new_tokens, samples, rows
        self.temperature, self.top_p = temperature, top_p

    def base_identity(self) -> dict[str, Any]:
        """Name and hash of the measured weights."""
        return {"name": self.base.pretrained, "hash": self.base.identity()}

    def records(self, batch: Any) -> list[Record]:
        """One record for each answer: the question, and under `arms` what every arm said."""
        questions = batch["questions"]
        if not questions:
            return []
        prompts = [question.prompt for question in questions]
        arms = {FULL: self._answer(questions, prompts, None)}
        bare = [question.bare_prompt for question in questions]
        if None not in bare:
            arms[NO_CONTEXT] = self._answer(questions, bare, None)
        for name, eviction in self.arms.items():
            arms[name] = self._answer(questions, prompts, eviction)
        return [
            {
                "id": question.id * self.samples + sample,
                "question": question.id,
                "group": question.group,
                "gold": question.gold,
                "arms": {name: answers[number * self.samples + sample] for name, answers in arms.items()},
            }
            for number, question in enumerate(questions)
            for sample in range(self.samples)
        ]

    def _answer(self, questions: Any, prompts: Any, eviction: Eviction | None) -> list[Record]:
        """All answers, those to one question side by side."""
        together = len(questions) if self.rows is None else max(1, self.rows // self.samples)
        answers: list[Record] = []
        for start in range(0, len(questions), together):
            part = slice(start, start + together)
            copies = [
                self._decode(questions[part], prompts[part], eviction, first, count) for first, count in self._copies()
            ]
            for number in range(len(questions[part])):
                for found, (_, count) in zip(copies, self._copies()):
                    answers += found[number * count : (number + 1) * count]
        return answers

    def _copies(self) -> list[tuple[int, int]]:
        """Samples of one question as they are decoded together: the first, and how many."""
        together = self.samples if self.rows is None else min(self.samples, self.rows)
        return [(first, min(together, self.samples - first)) for first in range(0, self.samples, together)]

    def _decode(
        self, questions: Any, prompts: Any, eviction: Eviction | None, first: int, samples: int
    ) -> list[Record]:
        # Rows of one call draw independently; so do calls, since each begins with another question or sample.
        seed = self.seed + questions[0].id * self.samples + first
        sampler = Greedy() if self.temperature == 0 else Sampling(self.temperature, self.top_p, seed=seed)
        return answer(
            self.backbone, self.tokenizer, questions, prompts, eviction, self.max_new_tokens, samples, sampler
        )

    def summarize(self, records: Sequence[Record]) -> Summary:
        """Accuracy and costs of the full memory and of every arm, with paired differences."""
        return summarize(records, self.seed)

    def figures(self, records: Sequence[Record], summary: Summary) -> "dict[str, Figure]":
        """Accuracy against the budget, a line for each policy."""
        from kvc.methods.rkv.picture import accuracy_by_budget

        return {"accuracy": accuracy_by_budget(summary)}
