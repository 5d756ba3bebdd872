"""A study that is killed and started again leaves the bytes of one that was not; damage and strangers are refused."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from study_tiny import planned, study, tiny

from kvc.cache import store
from kvc.errors import UserError
from kvc.methods.study import study as study_module
from kvc.methods.study.folder import MemoryFolder, load_studied
from kvc.methods.study.study import Study

SETTINGS: dict[str, Any] = {
    "mode": "takeaways",
    "max_new_tokens": 4,
    "temperature": 1.0,
    "rotation": "compact",
    "budget": 48,
}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("whole")
    study(folder, **SETTINGS)
    return contents(folder)


def dies(then: int, real: Callable[..., Any], after: bool = False) -> Callable[..., Any]:
    """A function that kills the process in its `then`-th call."""
    calls = iter(range(1, 1000))

    def die(*args: Any, **kwargs: Any) -> Any:
        last = next(calls) == then
        if last and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = real(*args, **kwargs)
        if last:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    return die


KILLS: list[tuple[Any, str, int, bool]] = [
    (study_module, "read", 2, False),  # inside the first document
    (study_module, "write", 3, True),  # inside the third, its summary written and not yet read
    (store, "save_file", 2, True),  # half-way between a file's temporary name and its own
    (MemoryFolder, "save", 3, True),  # between documents
    (MemoryFolder, "finish", 1, False),  # the memory is there, its metadata are not
]


def test_any_kill_leaves_the_same_bytes(
    tmp_path: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = tiny()
    plan = planned(**SETTINGS)
    for number, (owner, name, then, after) in enumerate(KILLS):
        folder = tmp_path / str(number)
        child = os.fork()
        if child == 0:
            try:
                monkeypatch.setattr(owner, name, dies(then, getattr(owner, name), after))
                Study(model, plan).run(MemoryFolder(folder))
            finally:
                os._exit(1)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL, name
        assert (folder / "memory.safetensors").exists() == (name == "finish")
        lines: list[str] = []
        Study(model, plan).run(MemoryFolder(folder), report=lines.append)
        assert contents(folder) == whole, name
        if name == "save":
            assert lines[0] == "going on after document 3"
            assert len(lines) == 2


def test_a_finished_study_is_left_as_it_is(tmp_path: Path, whole: dict[str, bytes]) -> None:
    for name, content in whole.items():
        (tmp_path / name).write_bytes(content)
    before = (tmp_path / "memory.safetensors").stat().st_mtime_ns
    model, _ = tiny()
    lines: list[str] = []
    Study(model, planned(**SETTINGS)).run(MemoryFolder(tmp_path), report=lines.append)
    assert lines == ["the memory of this study is there already; --recompute makes it anew"]
    assert (tmp_path / "memory.safetensors").stat().st_mtime_ns == before
    assert contents(tmp_path) == whole
    assert json.loads(whole["metadata.json"])["done"] == 4


@pytest.mark.parametrize("change", [{"budget": 49}, {"seed": 7}, {"rotation": "place:64"}, {"num_epochs": 2}])
def test_another_study_is_never_mistaken_for_it(
    tmp_path: Path, whole: dict[str, bytes], change: dict[str, Any]
) -> None:
    (tmp_path / "memory.safetensors").write_bytes(whole["memory.safetensors"])
    model, _ = tiny()
    (key,) = change
    with pytest.raises(
        UserError, match=rf"holds the memory of another study \(.*{'documents' if key == 'num_epochs' else key} is"
    ):
        Study(model, planned(**{**SETTINGS, **change})).run(MemoryFolder(tmp_path))
    assert contents(tmp_path) == {"memory.safetensors": whole["memory.safetensors"]}


@pytest.mark.parametrize("name", ["memory", "unfinished"])
@pytest.mark.parametrize("place", [0.0, 0.5, 0.99])
def test_damage_is_found_and_recompute_mends_it(
    tmp_path: Path, whole: dict[str, bytes], name: str, place: float
) -> None:
    content = bytearray(whole["memory.safetensors"])
    content[int(len(content) * place)] ^= 1
    (tmp_path / f"{name}.safetensors").write_bytes(content)
    model, _ = tiny()
    with pytest.raises(UserError, match="--recompute makes it anew"):
        Study(model, planned(**SETTINGS)).run(MemoryFolder(tmp_path))
    assert contents(tmp_path) == {f"{name}.safetensors": bytes(content)}
    if place == 0.5 and name == "memory":
        Study(model, planned(**SETTINGS)).run(MemoryFolder(tmp_path), recompute=True)
        assert contents(tmp_path) == whole


def test_a_memory_after_each_document(tmp_path: Path) -> None:
    model, _ = tiny()
    study(tmp_path, every_document=True)
    folder = MemoryFolder(tmp_path)
    for number in range(1, 5):
        memory, said = load_studied(folder.stage(number), model)
        assert said["done"] == number
        assert memory.next_position.tolist() == [len(said["token_ids"])]
    last = load_studied(folder.memory, model)[0]
    assert torch.equal(last.layers[1].keys, memory.layers[1].keys)
    with pytest.raises(UserError, match=r"doc_id: .*document_0005"):
        folder.stage(5)


def test_a_memory_that_no_study_wrote_is_refused(tmp_path: Path) -> None:
    model, _ = tiny()
    memory, _ = study(tmp_path / "first")
    store.save_memory(memory, tmp_path / "memory.safetensors", model)
    with pytest.raises(UserError, match="not one that kvc study wrote"):
        load_studied(tmp_path / "memory.safetensors", model)
