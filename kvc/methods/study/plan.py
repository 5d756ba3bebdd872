"""What a study will read, token by token, and the name of all that decides its outcome."""

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvc.cache.fingerprint import display_name, fingerprint
from kvc.cache.rotation import Rotation
from kvc.core.files import digest
from kvc.errors import UserError
from kvc.eviction.policy import Policy
from kvc.eviction.rkv import RKV
from kvc.methods.study.conversation import Conversation
from kvc.methods.study.documents import Document, Kind
from kvc.methods.study.layouts import LAYOUTS
from kvc.methods.study.modes import MODES
from kvc.methods.study.settings import StudySettings

SCHEMA = 1


@dataclass(frozen=True)
class Lesson:
    """One reading of one document.

    Attributes:
        where: File and line.
        ids: Its token ids, the header of what is written after it included.
    """

    where: str
    ids: list[int]


@dataclass(frozen=True)
class Plan:
    """Everything a study needs but the model.

    Attributes:
        kind: Of the documents.
        conversation: Turns texts into token ids.
        settings: How.
        policy: Which rows stay.
        opening: Token ids before the first document.
        lessons: In the order in which they are read, every epoch.
        skipped: Documents that were too long, with their tokens.
        identity: Settings, model and content, as JSON.
    """

    kind: Kind
    conversation: Conversation
    settings: StudySettings
    policy: Policy
    opening: list[int]
    lessons: list[Lesson]
    skipped: list[str]
    identity: dict[str, Any]

    @property
    def hash(self) -> str:
        """Name of the identity."""
        return digest(self.identity)

    @property
    def name(self) -> str:
        """A folder name: model, budget, window, complexity, mode, rotation, documents, epochs if several, hash."""
        s = self.settings
        model = re.sub(r"[^A-Za-z0-9.-]+", "-", PurePath(self.identity["model"]["name"]).name)
        parts = [model, s.budget or "full", s.window, s.summary_complexity, s.mode, s.rotation.replace(":", "")]
        parts += [len(self.lessons) // s.num_epochs, *([s.num_epochs] if s.num_epochs > 1 else []), self.hash[:8]]
        return "_".join(map(str, parts))


def plan(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[Document],
    settings: StudySettings,
    policy: Policy | None = None,
) -> Plan:
    """Plan a study.

    Args:
        model: Only its name is taken.
        tokenizer: With a chat template.
        documents: In the order of reading.
        settings: How.
        policy: Which rows stay; None takes R-KV with the window of the settings.

    Raises:
        UserError: If nothing can be read, budget, policy and chat template do not fit together, or the keys of the
            model cannot be moved.
    """
    if not documents:
        raise UserError("documents: there is none to study")
    policy = policy or RKV(window=settings.window)
    settings.eviction(policy)
    kind = documents[0].kind
    conversation = Conversation(tokenizer, LAYOUTS[kind])
    header = MODES[settings.mode].header
    lessons: list[Lesson] = []
    skipped: list[str] = []
    for epoch in range(settings.num_epochs):
        for document in documents:
            ids = conversation.encode(document.block(len(lessons) + 1) + header)
            where = PurePath(document.where).name
            if len(ids) <= settings.max_document_tokens:
                lessons.append(Lesson(where, ids))
            elif epoch == 0:
                skipped.append(f"{where}: {len(ids)} tokens")
    if not lessons:
        raise UserError(f"documents: all of them have more than max_document_tokens = {settings.max_document_tokens}")
    if skipped:
        warnings.warn(
            f"{len(skipped)} documents are left out, they have more than {settings.max_document_tokens} tokens: "
            + "; ".join(skipped),
            stacklevel=2,
        )
    opening = conversation.opening()
    if settings.rotates[0] != "keep":
        Rotation(model).check()
    _check_reach(model, settings, [len(opening), *(len(lesson.ids) for lesson in lessons)])
    identity = {
        "schema": SCHEMA,
        "model": {"name": display_name(model), "hash": fingerprint(model)},
        "documents": digest([opening, *(lesson.ids for lesson in lessons)]),
        **settings.as_dict(policy),
    }
    return Plan(kind, conversation, settings, policy, opening, lessons, skipped, identity)


def _check_reach(model: PreTrainedModel, settings: StudySettings, lengths: Sequence[int]) -> None:
    """Warn where tokens come to lie at positions that the model was not made for.

    Args:
        model: Its config says how far it reaches.
        settings: How.
        lengths: Tokens of the opening and of every lesson.
    """
    config: Any = model.config.get_text_config(decoder=True)
    limit = getattr(config, "max_position_embeddings", None)
    mode, end = settings.rotates
    longest = max(lengths)
    before = sum(lengths) - longest
    if mode == "compact" and settings.budget is not None:
        before = min(before, settings.budget)
    reach = longest + (before if end is None else end)
    if limit is not None and reach > limit:
        warnings.warn(
            f"the study reaches position {reach}, and the model was made for {limit}; shorter documents, or --rotation "
            "compact with a budget, keep it below",
            stacklevel=3,
        )
