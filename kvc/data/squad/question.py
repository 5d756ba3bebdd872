"""A question of SQuAD as a decoding evaluation sees it."""

from typing import NamedTuple

from kvc.data.questions import Judged
from kvc.data.squad.example import SquadExample
from kvc.data.squad.grading import Score, answer_text, score


class SquadQuestion(NamedTuple):
    """A prompt and its judge; see `kvc.data.questions.Question`.

    Attributes:
        id: Its number in the split.
        prompt: Everything before the answer, without BOS.
        bare_prompt: The prompt without the context.
        example: Question, context and all gold answers.
        no_answer: What stands for "the context does not say it"; None if every question has an answer.
    """

    id: int
    prompt: str
    bare_prompt: str | None
    example: SquadExample
    no_answer: str | None

    @property
    def group(self) -> str:
        """`answerable` or `unanswerable`."""
        return "answerable" if self.example.answerable else "unanswerable"

    @property
    def gold(self) -> str:
        """The first gold answer, which is empty for a question without one."""
        return self.example.answers[0]

    def score(self, completion: str) -> Score:
        """EM and F1 of a completion's first line against the best gold answer."""
        text = answer_text(completion)
        if self.no_answer is not None and text.rstrip(".").lower() == self.no_answer.lower():
            text = ""
        return score(text, self.example.answers)

    def judge(self, completion: str) -> Judged:
        """Right is an exact match."""
        found = self.score(completion)
        return Judged(found.text, found.em)
