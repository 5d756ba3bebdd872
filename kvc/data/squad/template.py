"""How a question is presented: what stands before the context, and what after it.

The context is the span that is compressed. Each part is tokenised alone, so the tokens of one do not depend on another,
and special tokens come in once.
"""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from kvc.data.prompts import DATE
from kvc.errors import UserError

Preset = Literal["plain", "seed", "chat"]
_CONTEXT = "\x1dCONTEXT\x1d"


@dataclass(frozen=True)
class SquadTemplate:
    r"""The parts of a prompt.

    Attributes:
        instruction: What comes first.
        context: Label of the context, which follows after a blank.
        question: The question, with `{question}`.
        cue: What the answer follows.
        question_first: The question stands before the context.
        chat: Present all of it as the user's message, in the tokenizer's chat template.
    """

    instruction: str = ""
    context: str = "Passage:"
    question: str = "\nQuestion: {question}"
    cue: str = "\nAnswer:"
    question_first: bool = False
    chat: bool = False

    def __post_init__(self) -> None:
        """Check that the question has a place.

        Raises:
            UserError: If it has none.
        """
        if "{question}" not in self.question:
            raise UserError("data.template.question must hold {question}")


PLAIN = SquadTemplate()
SEED = SquadTemplate(context="\nContext:", question="Question: {question}", question_first=True)
CHAT = SquadTemplate(
    "Answer the question with a few words of the passage.\n\n", question="\n\nQuestion: {question}", cue="", chat=True
)
PRESETS: dict[str, SquadTemplate] = {"plain": PLAIN, "seed": SEED, "chat": CHAT}


class Rendered(NamedTuple):
    """A prompt is `head + " " + context + tail`.

    Attributes:
        head: Before the context, without BOS unless the chat template writes it.
        tail: After the context.
        bare: The prompt without the context.
    """

    head: str
    tail: str
    bare: str

    def prompt(self, context: str) -> str:
        """The whole prompt."""
        return f"{self.head} {context}{self.tail}"


def render(template: SquadTemplate, question: str, tokenizer: Any = None) -> Rendered:
    """The parts around the context.

    Args:
        template: The parts.
        question: The question.
        tokenizer: Only a chat template needs it.

    Raises:
        UserError: If a chat template is asked for and the tokenizer has none, or one that loses the context.
    """
    # Not str.format: instructions may hold braces of their own.
    asked = template.question.replace("{question}", question)
    if template.question_first:
        head, tail = template.instruction + asked + template.context, template.cue
        bare = template.instruction + asked + template.cue
    else:
        head, tail = template.instruction + template.context, asked + template.cue
        bare = template.instruction + (asked + template.cue).lstrip()
    if not template.chat:
        return Rendered(head, tail, bare)
    parts = _chat(f"{head} {_CONTEXT}{tail}", tokenizer).split(f" {_CONTEXT}")
    if len(parts) != 2:
        raise UserError("data.template: the tokenizer's chat template does not keep the message as it is; use 'plain'")
    return Rendered(parts[0], parts[1], _chat(bare, tokenizer))


def _chat(message: str, tokenizer: Any) -> str:
    if getattr(tokenizer, "chat_template", None) is None:
        raise UserError("data.template: 'chat' needs a tokenizer with a chat template, this one has none; use 'plain'")
    options = {"tokenize": False, "add_generation_prompt": True, "date_string": DATE}
    return str(tokenizer.apply_chat_template([{"role": "user", "content": message}], **options))
