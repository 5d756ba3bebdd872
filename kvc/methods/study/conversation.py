"""The token ids of a study: its opening, its pieces, and a question after it, in the chat template of the model.

The documents are read inside one assistant message, between `<think>` and `</think>`. Every piece is encoded without
special tokens of its own, so BOS stands once, at the very start.
"""

from typing import Any

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from kvc.data.prompts import DATE
from kvc.errors import UserError
from kvc.methods.study.layouts import BEGIN_THINK, END_THINK, Layout

_PLACE = "KVC-PLACE-OF-THE-STUDY"


class Conversation:
    """Turns texts into token ids.

    Args:
        tokenizer: With a chat template.
        layout: The words around the documents.

    Raises:
        UserError: If the tokenizer has no chat template, or one that cannot hold a study.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, layout: Layout) -> None:
        if getattr(tokenizer, "chat_template", None) is None:
            raise UserError(
                "model: its tokenizer has no chat template, and a study is a conversation; take a chat model"
            )
        self.tokenizer, self.layout = tokenizer, layout

    def opening(self) -> list[int]:
        """Everything before the first document, BOS included."""
        # An empty block of thoughts, as templates write it for answers at once, would be over before it begins.
        return self._from_start(_opened(self._render([self._instruction], thinking=True)) + self.layout.start)

    def encode(self, text: str) -> list[int]:
        """One piece of text."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def question(self, question: str) -> list[int]:
        """The end of the study and a question, up to where the answer begins."""
        asked = {"role": "user", "content": self.layout.learned.format(question=question)}
        whole = self._render([self._instruction, {"role": "assistant", "content": _PLACE}, asked], self.layout.thinks)
        if whole.count(_PLACE) != 1:
            raise UserError("model: its chat template does not keep the messages of the assistant, so it cannot study")
        rest = whole.split(_PLACE)[1]
        return self.encode(f"{END_THINK}\n{self.layout.done}{self._answering(rest)}")

    def alone(self, question: str) -> list[int]:
        """A question to a model that has studied nothing, BOS included."""
        text = self._render(
            [{"role": "user", "content": self.layout.fresh.format(question=question)}], self.layout.thinks
        )
        return self._from_start(self._answering(text))

    @property
    def _instruction(self) -> dict[str, str]:
        return {"role": "user", "content": self.layout.instruction}

    def _answering(self, text: str) -> str:
        return (_opened(text) if self.layout.thinks else text) + self.layout.lead

    def _from_start(self, text: str) -> list[int]:
        """A text that nothing comes before; BOS goes first unless the template has written it."""
        bos: Any = self.tokenizer.bos_token
        ids = self.encode(text)
        return ids if bos is None or text.startswith(bos) else [int(self.tokenizer.bos_token_id), *ids]

    def _render(self, messages: list[dict[str, str]], thinking: bool) -> str:
        # Templates that print today's date would make another prompt every day.
        options: dict[str, Any] = {"tokenize": False, "add_generation_prompt": True, "date_string": DATE}
        options["enable_thinking"] = thinking
        try:
            return str(self.tokenizer.apply_chat_template(messages, **options))
        except TemplateError as error:
            raise UserError(f"model: its chat template refuses the conversation of a study: {error}") from error


def _opened(text: str) -> str:
    """A prompt that ends with the beginning of the thinking."""
    return text if text.rstrip().endswith(BEGIN_THINK) else f"{text}{BEGIN_THINK}\n"
