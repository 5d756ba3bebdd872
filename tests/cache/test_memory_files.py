"""A memory's file: the same bits in another process, and one sentence about every file that is not one."""

import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from kv_models import tiny, tokens
from safetensors.torch import save_file

from kvc.cache.codec import Storage
from kvc.cache.memory import KVMemory
from kvc.cache.store import inside, load_memory, read_metadata, save_memory
from kvc.errors import UserError

READER = """
import hashlib, json, sys
sys.path.insert(0, sys.argv[2])
import torch
from kv_models import tiny, tokens
from kvc.cache.store import load_memory
model = tiny("llama")
result = {}
for path in sys.argv[3:]:
    memory = load_memory(path, model)
    parts = [part for layer in memory.layers for part in (*layer.rows[0], *layer.rows[1], layer.positions)]
    hashes = [hashlib.sha256(p.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest() for p in parts]
    following = memory.next_position.tolist()
    with torch.no_grad():
        logits = model(tokens(2, 3, seed=4), past_key_values=memory).logits
    result[path] = [hashes, logits.tolist(), memory.rotated.mode, following]
json.dump(result, open(sys.argv[1], "w"))
"""


def shrunken(storage: Storage = "full") -> KVMemory:
    model = tiny("llama")
    memory = KVMemory(model, storage)
    with torch.no_grad():
        model(tokens(2, 10), past_key_values=memory)
    memory.keep(0, torch.tensor([[[0, 4, 9], [-1, 2, 8]], [[-1, -1, 9], [3, 7, 9]]]))
    memory.keep(1, torch.tensor([2, 3]).expand(2, 2, -1))
    memory.rotate("place", prefix=1, target_end=20)
    return memory


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "memory.safetensors"
    save_memory(shrunken(), path, tiny("llama"), {"documents": ["a"]})
    return path


@pytest.mark.slow
def test_another_process_reads_the_same_bits(tmp_path: Path) -> None:
    import hashlib

    model, ids, expected = tiny("llama"), tokens(2, 3, seed=4), {}
    for storage in ("full", "int4"):
        memory, path = shrunken(storage), tmp_path / f"{storage}.safetensors"
        save_memory(memory, path, model)
        parts = [part for layer in memory.layers for part in (*layer.rows[0], *layer.rows[1], layer.positions)]
        hashes = [hashlib.sha256(p.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest() for p in parts]
        with torch.no_grad():
            logits = model(ids, past_key_values=memory).logits
        expected[str(path)] = [hashes, logits.tolist(), "place", [20, 20]]
    here = Path(__file__).parent
    result = tmp_path / "result.json"
    subprocess.run(
        [sys.executable, "-c", READER, str(result), str(here), *expected],
        check=True,
        cwd=here.parents[1],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(here.parents[1])},
    )
    assert json.loads(result.read_text()) == expected


def test_metadata_says_what_it_is(saved: Path) -> None:
    metadata = read_metadata(saved)
    assert metadata["user"] == {"documents": ["a"]}
    assert metadata["rotation"] == {"mode": "place", "prefix": 1, "target_end": 20}
    assert metadata["next_position"] == [20, 20]
    assert metadata["tokens"] == [2.25, 2.0]
    assert metadata["dtype"] == "float32"
    assert metadata["versions"]["torch"] == torch.__version__
    assert set(metadata["model"]) == {"name", "hash"}
    assert load_memory(saved, tiny("llama"), verify=False).tokens.tolist() == [2.25, 2.0]


def test_loaded_rows_are_views_of_the_file(saved: Path) -> None:
    """Growing or dropping makes new tensors, so the file stays as it is."""
    before = saved.read_bytes()
    memory = load_memory(saved, tiny("llama"))
    with torch.no_grad():
        tiny("llama")(tokens(2, 3), past_key_values=memory)
    memory.keep(0, torch.tensor([[[0]]]).expand(2, 2, -1))
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def one_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)


def no_header(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:5])


def huge_header(path: Path) -> None:
    path.write_bytes(struct.pack("<Q", 1 << 60) + path.read_bytes()[8:])


def another_header(change: Any) -> Any:
    def apply(path: Path) -> None:
        data = path.read_bytes()
        (size,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + size])
        metadata = json.loads(header["__metadata__"]["kvc"])
        change(metadata)
        header["__metadata__"]["kvc"] = json.dumps(metadata)
        text = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])

    return apply


def plain_tensors(path: Path) -> None:
    save_file({"weight": torch.zeros(2)}, path)


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def not_json(path: Path) -> None:
    path.write_bytes(struct.pack("<Q", 4) + b"\x80\x04K." + b"rest")


@pytest.mark.parametrize(
    ("break_it", "sentence"),
    [
        (cut_off, "damaged or cut off"),
        (one_bit, "do not have the hash"),
        (no_header, "damaged, or not a safetensors file"),
        (huge_header, "header is too long"),
        (not_json, "damaged, or not a safetensors file"),
        (plain_tensors, "not a KV memory"),
        (a_folder, "no such file"),
        (Path.unlink, "no such file"),
        (
            another_header(lambda m: m["next_position"].reverse() or m.update(next_position=[1, 2])),
            "its header does not",
        ),
        (another_header(lambda m: m.pop("content")), "not a KV memory"),
        (another_header(lambda m: m.update(schema=99)), "schema 99"),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)[:20]),
)
def test_damaged_files_are_refused(saved: Path, break_it: Any, sentence: str) -> None:
    break_it(saved)
    with pytest.raises(UserError, match=sentence) as error:
        load_memory(saved, tiny("llama"))
    assert "\n" not in str(error.value)
    assert str(saved) in str(error.value)


def test_honest_hashes_of_tensors_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    from kvc.cache import store

    memory, path = shrunken(), tmp_path / "m.safetensors"
    layer = memory.layers[0]
    layer._seen = layer.seen[..., :-1]
    save_memory(memory, path, tiny("llama"))
    with pytest.raises(UserError, match="layer 0 do not fit together"):
        load_memory(path, tiny("llama"))
    memory = shrunken()
    memory.layers.pop()
    save_memory(memory, path, tiny("llama"))
    with pytest.raises(UserError, match="does not hold the tensors"):
        store.load_memory(path, tiny("llama"))


def test_memories_of_other_models_are_refused(saved: Path) -> None:
    for other in (tiny("llama", seed=1), tiny("qwen2"), tiny("one-layer")):
        with pytest.raises(UserError, match="a memory of the model") as error:
            load_memory(saved, other)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("change", ["one weight", "precision", "adapter"])
def test_a_changed_model_is_another_model(change: str) -> None:
    import copy

    from kvc.cache.fingerprint import fingerprint

    model: Any = copy.deepcopy(tiny("llama"))
    before = fingerprint(model)
    assert before == fingerprint(tiny("llama"))
    if change == "one weight":
        model.model.norm.weight.data[0] += 1e-3
    elif change == "precision":
        model.bfloat16()
    else:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=2, target_modules=["k_proj"], task_type="CAUSAL_LM"))
    assert fingerprint(model) != before


def test_paths_that_leave_the_folder_are_refused(saved: Path, tmp_path: Path) -> None:
    root = tmp_path / "run"
    root.mkdir()
    (root / "link.safetensors").symlink_to(saved)
    (root / "loop").symlink_to(tmp_path)
    for name in ("../memory.safetensors", str(saved), "link.safetensors", "loop/memory.safetensors", ".", "a/../../x"):
        with pytest.raises(UserError, match="leads out of the folder"):
            load_memory(name, tiny("llama"), root=root)
    assert inside(tmp_path, "memory.safetensors") == saved.resolve()
    assert load_memory("memory.safetensors", tiny("llama"), root=tmp_path).layers[0].length == 3


def test_what_cannot_be_written_is_said(tmp_path: Path) -> None:
    model, path = tiny("llama"), tmp_path / "m.safetensors"
    with pytest.raises(UserError, match="empty"):
        save_memory(KVMemory(model), path, model)
    with pytest.raises(UserError, match="not JSON"):
        save_memory(shrunken(), path, model, {"x": object()})
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        save_memory(shrunken(), tmp_path / "file" / "m.safetensors", model)
    assert not path.exists()


def test_an_interrupted_write_leaves_the_old_file(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kvc.cache import store

    before = saved.read_bytes()

    def fail(tensors: Any, path: Path, metadata: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store, "save_file", fail)
    with pytest.raises(UserError, match="No space left"):
        save_memory(shrunken(), saved, tiny("llama"))
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]
