"""How a question is presented to a language model: one place for training, cached states and generation."""

from typing import Any, Literal

from kvc.errors import UserError

Template = Literal["plain", "chat"]
SYSTEM = "Solve the problem step by step and end with a line that holds #### and the final number."


def render_prompt(question: str, template: Template = "plain", tokenizer: Any = None) -> str:
    r"""The text that comes before the first character of the solution.

    Both forms end so that the solution starts at the beginning of a line: a prompt that ends in a space would change
    the first token of the solution.

    Args:
        question: The problem, without any template.
        template: `"plain"` gives `Question: ...\nSolution:\n`; `"chat"` uses the chat template of the tokenizer.
        tokenizer: A Hugging Face tokenizer with a chat template; only `"chat"` needs it.

    Raises:
        UserError: The template is unknown, or `"chat"` is asked for and the tokenizer has no chat template.
    """
    if template == "plain":
        return f"Question: {question}\nSolution:\n"
    if template != "chat":
        raise UserError(f"template: {template!r} is unknown, use 'plain' or 'chat'")
    if getattr(tokenizer, "chat_template", None) is None:
        raise UserError("template: 'chat' needs a tokenizer with a chat template, this one has none; use 'plain'")
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
