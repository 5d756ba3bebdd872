"""Reading documents one after the other into one memory of a fixed size."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from kvc.cache.memory import KVMemory
from kvc.core.backbone import TINY, Backbone
from kvc.core.files import digest
from kvc.errors import UserError
from kvc.methods.study.folder import MemoryFolder, load_studied
from kvc.methods.study.modes import MODES, Mode
from kvc.methods.study.plan import Lesson, Plan
from kvc.methods.study.reading import END, read, sampler_of, write

Report = Callable[[str], None]


class Study:
    """Reads the documents of a plan and writes the memory after each.

    After every document the memory is read back from its file, so a study that was stopped goes on from exactly what
    one that was not stopped goes on from.

    Args:
        model: In eval mode.
        plan: What is read, and how.
        backbone: What the model was loaded from; noted in the memory, so that it is found again.
        progress: Show a bar while the model writes.
    """

    def __init__(
        self, model: PreTrainedModel, plan: Plan, backbone: Backbone | None = None, progress: bool = False
    ) -> None:
        self.model, self.plan, self.progress = model, plan, progress
        self.backbone = {} if backbone is None else {"pretrained": _public(backbone), "dtype": backbone.dtype}
        self.mode: Mode = MODES[plan.settings.mode](plan.settings.summary_complexity)

    def run(self, folder: MemoryFolder, recompute: bool = False, report: Report = lambda line: None) -> dict[str, Any]:
        """Study, or go on studying; a finished study of the same plan is left as it is.

        Args:
            folder: Where the memory goes.
            recompute: Forget what the folder holds.
            report: Told about every document.

        Returns:
            Metadata of the memory's file; its `user.study` is everything about the study.

        Raises:
            UserError: If the folder holds the memory of another study, or a damaged one.
        """
        path = folder.state(self.plan.identity, recompute)
        folder.sweep()
        if path is not None and path == folder.memory:
            self._load(path)
            report("the memory of this study is there already; --recompute makes it anew")
            return folder.finish()
        state = self._fresh() if path is None else self._load(path)[1]
        if state["done"]:
            report(f"going on after document {state['done']}")
        total = len(self.plan.lessons)
        for number in range(state["done"], total):
            memory = KVMemory(self.model) if path is None else self._load(path)[0]
            line = self._document(number, memory, state)
            path = folder.save(memory, self.model, state, finished=number + 1 == total)
            report(f"document {number + 1} of {total}: {line}")
        return folder.finish()

    def _load(self, path: Path) -> tuple[KVMemory, dict[str, Any]]:
        try:
            return load_studied(path, self.model)
        except UserError as error:
            raise UserError(f"{error}; --recompute makes it anew") from error

    def _fresh(self) -> dict[str, Any]:
        """What is known before the first document."""
        return {
            "identity": self.plan.identity,
            "kind": self.plan.kind,
            "backbone": self.backbone,
            "opening_tokens": len(self.plan.opening),
            "skipped": self.plan.skipped,
            "done": 0,
            "documents": [],
            "summaries": [],
            "note": "",
            "token_ids": [],
        }

    def _document(self, number: int, memory: KVMemory, state: dict[str, Any]) -> str:
        """Read one document, write about it, compress, move; returns a line about it."""
        settings, lesson = self.plan.settings, self.plan.lessons[number]
        eviction = settings.eviction(self.plan.policy)
        ids = [*([] if number else self.plan.opening), *lesson.ids]
        start = len(state["token_ids"])
        if eviction is not None:
            eviction.begin(self.model, memory)
        try:
            read(self.model, memory, ids, settings.chunk)
            written = self._write(number, memory, state)
            if written:
                read(self.model, memory, written, settings.chunk)
            before = round(float(memory.tokens[0]))
            if eviction is not None:
                eviction.compress([0], 1)
        finally:
            if eviction is not None:
                eviction.end()
        mode, end = settings.rotates
        memory.rotate(mode, settings.prefix if mode != "keep" else 0, end)
        state["token_ids"] += ids + written
        state["documents"].append(_entry(lesson, start, len(state["token_ids"])))
        state["note"] = self.mode.note([summary["text"] for summary in state["summaries"]])
        state["done"] = number + 1
        return f"{len(ids) + len(written)} tokens read, {before} rows -> {float(memory.tokens[0]):g}"

    def _write(self, number: int, memory: KVMemory, state: dict[str, Any]) -> list[int]:
        """Write about the document that was just read.

        Returns:
            Token ids of what the memory is to keep of it.
        """
        settings, encode = self.plan.settings, self.plan.conversation.encode
        request = self.mode.request([summary["text"] for summary in state["summaries"]])
        if request is None:
            return []
        seed = int(digest([settings.seed, "summary", number])[:8], 16)
        text, new_tokens, finish = write(
            self.model,
            self.plan.conversation.tokenizer,
            memory,
            encode(request.text),
            settings.max_new_tokens,
            sampler_of(settings.temperature, settings.top_p, seed),
            self.progress,
        )
        # The number that the request ended with belongs to the list.
        text = f"{request.first}. {text}"
        state["summaries"].append(
            {"document": number + 1, "request": request.text, "text": text, "new_tokens": new_tokens, "finish": finish}
        )
        return encode(f"{text}\n{END}\n\n")


def _public(backbone: Backbone) -> str | None:
    """The name of a model that every machine knows; a folder of this one is nobody's business."""
    name = backbone.pretrained
    local = name != TINY and (name.startswith((".", "/", "~")) or Path(name).exists())
    return None if local else name


def _entry(lesson: Lesson, start: int, end: int) -> dict[str, Any]:
    """A document in the list of what was read: where it comes from, and which token ids are its own."""
    return {"where": lesson.where, "start": start, "end": end}


def studied(folder: str | Path, model: PreTrainedModel) -> KVMemory:
    """The memory in a folder, e.g. to generate from: `model.generate(ids, **memory.generate_kwargs(ids))`."""
    return load_studied(MemoryFolder(Path(folder)).stage(), model)[0]
