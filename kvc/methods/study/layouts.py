"""What is said around the documents, and how a question is put afterwards."""

from dataclasses import dataclass

from kvc.methods.study.documents import Kind

BEGIN_THINK, END_THINK = "<think>", "</think>"


@dataclass(frozen=True)
class Layout:
    """The words of one kind of study; `{question}` stands for the question.

    Attributes:
        instruction: The user's message that opens the study.
        start: First words of the thinking in which the documents are read.
        done: What the assistant says when the thinking is over.
        learned: The user's message with the question, after a study.
        fresh: The same without one.
        thinks: Whether the assistant thinks before it answers.
        lead: First words of the answer.
    """

    instruction: str
    start: str
    done: str
    learned: str
    fresh: str
    thinks: bool
    lead: str = ""


_PROBLEM = (
    "###Problem:\n{question}\n\nReason step by step inside <think> and </think>, then give the solution after "
    r"</think>, with the final answer in \boxed{{}}."
)
LAYOUTS: dict[Kind, Layout] = {
    "problem": Layout(
        instruction=(
            "You are currently learning from some examples of solved problems. Read each of them with care, and keep "
            "in mind which methods, formulas and checks lead to the answer, so that you can solve new problems with "
            "them."
        ),
        start="Okay, my learning begins:\n\n",
        done="Learning has completed.",
        learned="Now, can you solve this new problem using what you've learned?\n\n" + _PROBLEM,
        fresh="Can you solve this problem?\n\n" + _PROBLEM,
        thinks=True,
    ),
    # Word for word what the tiny model was trained on.
    "text": Layout(
        instruction="Study these documents and learn what they say.",
        start="",
        done="Learning has completed.",
        learned="Question: {question}",
        fresh="Question: {question}",
        thinks=False,
        lead="Answer:",
    ),
}
