"""What the model is asked: a solution with `<COMP>` at the ends of finished thoughts, as text or as a JSON object."""

from typing import Any

from kvc.core.files import digest
from kvc.data.traces import MARKER

FIELD = "reasoning_with_compression"
PROMPT = f"""\
Solve the problem below step by step, in short plain sentences and equations.

The solution will be read by a model with a small memory. Wherever a thought is complete, so that everything up to \
there can be condensed, write the literal text {MARKER}. The right places are:
- after a calculation is finished and its result has been written down;
- after a key fact has been established that later steps rely on;
- at the end of a phase of the solution, before the next phase begins.

Rules:
- Use {MARKER} 3 to 6 times in the whole solution, always at the end of a sentence or line.
- Never put it into the middle of a calculation: not inside a number or an equation, not beside an operator or an \
equals sign, not before the result has been written.
- Never begin with it, and never write two of them with nothing in between.
- The last line is #### followed by the final number alone, without a unit. Nothing comes after it.

Example of the form:
A crate holds 4 rows of 6 jars, which makes 4 * 6 = 24 jars. {MARKER}
The shop buys 3 crates, so it has 3 * 24 = 72 jars. {MARKER}
It sells half of them, 72 / 2 = 36 jars, and 36 jars are left. {MARKER}
#### 36
"""
AS_JSON = f'Reply with a JSON object whose only key, "{FIELD}", holds the whole solution as one text.\n'
SCHEMA: dict[str, Any] = {
    "type": "json_schema",
    "json_schema": {
        "name": "marked_solution",
        "strict": True,
        "schema": {
            "type": "object",
            "properties": {
                FIELD: {"type": "string", "description": f"The solution with {MARKER} markers, ending in '#### N'."}
            },
            "required": [FIELD],
            "additionalProperties": False,
        },
    },
}
PROMPT_ID = digest([PROMPT, AS_JSON, SCHEMA])
"""Names the wording: replies to different wordings are never mixed in one journal."""


def messages(question: str, structured: bool) -> list[dict[str, str]]:
    """One user message, since the chat templates of some models know no system role.

    Args:
        question: The problem.
        structured: Whether the reply is to be a JSON object.
    """
    form = AS_JSON if structured else ""
    return [{"role": "user", "content": f"{PROMPT}{form}\nProblem: {question.strip()}"}]
