"""What a question is asked with: the studied memory, and what it is compared with."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from transformers import PreTrainedModel

from kvc.cache.memory import KVMemory
from kvc.errors import UserError
from kvc.methods.study.conversation import Conversation
from kvc.methods.study.reading import reread

ArmName = Literal["memory", "none", "full", "notes", "unrelated"]
ARMS: tuple[ArmName, ...] = ("memory", "none", "full", "notes", "unrelated")


@dataclass(frozen=True)
class Arm:
    """One way to answer.

    Attributes:
        name: Of `ARMS`.
        memory: What the model knows; None for nothing. It is left as it is.
    """

    name: ArmName
    memory: KVMemory | None


def arms_of(
    names: Sequence[ArmName],
    model: PreTrainedModel,
    conversation: Conversation,
    memory: KVMemory,
    study: dict[str, Any],
    unrelated: KVMemory | None = None,
) -> list[Arm]:
    """The arms of one studied memory.

    `full` reads all token ids of the study again and evicts nothing. `notes` reads what the model wrote instead of the
    documents; a study that wrote nothing gives the last of the documents' text, as many tokens as the memory has rows.

    Args:
        names: Which.
        model: In eval mode.
        conversation: Of the study's kind.
        memory: The studied memory.
        study: What its file says about the study.
        unrelated: The memory of other documents.

    Raises:
        UserError: If an arm lacks what it needs.
    """
    chunk: int = study["identity"]["chunk"]
    arms = []
    for name in ARMS:
        if name not in names:
            continue
        if name == "unrelated":
            if unrelated is None:
                raise UserError("arms: unrelated needs --unrelated, the memory of other documents")
            arms.append(Arm(name, unrelated))
        elif name == "memory":
            arms.append(Arm(name, memory))
        elif name == "none":
            arms.append(Arm(name, None))
        else:
            ids = study["token_ids"] if name == "full" else notes(conversation, memory, study)
            arms.append(Arm(name, reread(model, ids, chunk)))
    return arms


def notes(conversation: Conversation, memory: KVMemory, study: dict[str, Any]) -> list[int]:
    """Token ids of the opening and the notes, or of as much of the documents as the memory has rows."""
    opening: list[int] = study["token_ids"][: study["opening_tokens"]]
    if study["note"]:
        return opening + conversation.encode(f"{study['note']}\n\n")
    read: list[int] = study["token_ids"][len(opening) :]
    room = max(1, round(float(memory.tokens[0])) - len(opening))
    return opening + read[-room:]
