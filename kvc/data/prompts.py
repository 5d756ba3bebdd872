"""How a question is presented to a language model: one place for training, cached states and generation."""

from typing import Any, Literal

from kvc.errors import UserError

Template = Literal["plain", "chat"]
DATE = "01 Jan 2026"
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
    from jinja2.exceptions import TemplateError

    # Templates that print today's date would make another prompt every day.
    options = {"tokenize": False, "add_generation_prompt": True, "date_string": DATE}
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}]
    try:
        return str(tokenizer.apply_chat_template(messages, **options))
    except TemplateError:  # Gemma's and others know no system role
        messages = [{"role": "user", "content": f"{SYSTEM}\n\n{question}"}]
        return str(tokenizer.apply_chat_template(messages, **options))
