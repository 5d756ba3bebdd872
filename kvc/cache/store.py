"""A memory as one file, and back: safetensors, with everything else as JSON in its header.

The file is written beside its place and renamed, so a reader never meets half of one. It is read memory-mapped: bytes
come from the disk when they are used, unless the content hash is checked, which reads them all once.

Tensors: `LAYER.keys.PART`, `LAYER.values.PART` (the parts of the codec), `LAYER.positions` (int32) and
`next_position`. Header: one key, `kvc`, whose value is JSON:
`schema`, `versions`, `model` {name, hash}, `layers`, `dtype`, `codec`, `rotation`, `next_position`, `tokens`, `user`,
`tensors` {name: sha256} and `content`, the hash of all the rest.
"""

import hashlib
import json
import struct
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel

from kvc.cache.fingerprint import display_name, fingerprint
from kvc.cache.memory import KVMemory, Rotated
from kvc.core.files import atomic, digest
from kvc.errors import UserError

SCHEMA = 1
KEY = "kvc"
DTYPES = {"float64": torch.float64, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
MAX_HEADER = 100_000_000
"""Bytes; what the safetensors library itself allows."""


def save_memory(
    memory: KVMemory, path: str | Path, model: PreTrainedModel, user: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Write a memory.

    Args:
        memory: What to write.
        path: Its file, by custom `NAME.safetensors`; replaced if it is there.
        model: The model whose memory it is.
        user: Anything else to keep, as JSON.

    Returns:
        The header's metadata.

    Raises:
        UserError: If the memory is empty, `user` is not JSON, or the file cannot be written.
    """
    path = Path(path)
    if not memory.layers[0].is_initialized:
        raise UserError(f"{path}: the memory is empty, there is nothing to write")
    memory.settle()
    tensors = {"next_position": memory.next_position}
    for index, layer in enumerate(memory.layers):
        for name, parts in zip(("keys", "values"), layer.rows):
            tensors |= {f"{index}.{name}.{part}": t for part, t in zip(memory.codec.names, parts)}
        # safetensors refuses tensors that share memory, and layers may share positions.
        tensors[f"{index}.positions"] = layer.seen.clone()
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata: dict[str, Any] = {
        "schema": SCHEMA,
        "versions": {name: _version(name) for name in ("kvc", "torch", "transformers", "safetensors")},
        "model": {"name": display_name(model), "hash": fingerprint(model)},
        "layers": len(memory.layers),
        "dtype": str(memory.layers[0].dtype).removeprefix("torch."),
        "codec": asdict(memory.codec),  # type: ignore[call-overload]
        "rotation": asdict(memory.rotated),
        "next_position": memory.next_position.tolist(),
        "tokens": memory.tokens.tolist(),
        "user": user or {},
        "tensors": _hashes(tensors),
    }
    try:
        metadata["content"] = digest(metadata)
        header = {KEY: json.dumps(metadata, allow_nan=False)}
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: the user's metadata is not JSON: {error}") from error
    try:
        with atomic(path) as temporary:
            save_file(tensors, temporary, metadata=header)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error
    return metadata


def load_memory(
    path: str | Path, model: PreTrainedModel, root: str | Path | None = None, verify: bool = True
) -> KVMemory:
    """Read a memory back, memory-mapped, onto the device of `model`.

    Args:
        path: Its file; below `root` if that is given.
        model: The model whose memory it is, with the same weights in the same precision.
        root: Folder that `path` must not leave, for names that come from a file or a stranger.
        verify: Check the content hash. Without it, only header, shapes and positions are checked.

    Returns:
        The memory; its tensors are views of the file, and the same to the bit as those saved.

    Raises:
        UserError: If the file is missing, outside `root`, damaged, cut off, or of another model.
    """
    path = inside(root, path) if root is not None else Path(path)
    metadata = read_metadata(path)
    theirs, ours = metadata["model"], fingerprint(model)
    if theirs["hash"] != ours:
        raise UserError(
            f"{path}: a memory of the model '{theirs['name']}' ({theirs['hash']}), not of '{display_name(model)}' "
            f"({ours}) as it is loaded here"
        )
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: damaged or cut off: {error}") from error
    try:
        codec, dtype = metadata["codec"], DTYPES[metadata["dtype"]]
        memory = KVMemory(model, codec["storage"], codec.get("group", 64))
        memory.rotated = Rotated(**metadata["rotation"])
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: its header is not one that kvc writes: {error}") from error
    if verify and _hashes(tensors) != metadata["tensors"]:
        raise UserError(f"{path}: damaged: its tensors do not have the hash that was written with them")
    if set(tensors) != _names(memory):
        raise UserError(f"{path}: damaged: it does not hold the tensors of a memory of {len(memory.layers)} layers")
    _fill(memory, {name: tensor.to(model.device) for name, tensor in tensors.items()}, dtype, path)
    return memory


def read_metadata(path: str | Path) -> dict[str, Any]:
    """The header of a memory's file, without touching its tensors.

    Raises:
        UserError: If the file is missing, damaged, not a memory, or of a later version of kvc.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: there is no such file")
    try:
        with path.open("rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            if size > MAX_HEADER:
                raise ValueError("its header is too long")
            header = json.loads(file.read(size))
        metadata = json.loads(header["__metadata__"][KEY])
        content = metadata.pop("content")
        schema, _ = metadata["schema"], metadata["model"]["hash"] + metadata["model"]["name"]
    except KeyError as error:
        raise UserError(f"{path}: not a KV memory: its header has no {error}") from error
    except (OSError, ValueError, TypeError, AttributeError, struct.error) as error:
        raise UserError(f"{path}: damaged, or not a safetensors file: {' '.join(str(error).split())[:100]}") from error
    if schema != SCHEMA:
        raise UserError(f"{path}: schema {schema} is not the one that this kvc reads ({SCHEMA})")
    if digest(metadata) != content:
        raise UserError(f"{path}: damaged: its header does not have the hash that was written with it")
    return {**metadata, "content": content}


def inside(root: str | Path, name: str | Path) -> Path:
    """The path of `name` below `root`, links followed.

    Raises:
        UserError: If it leaves `root`.
    """
    base = Path(root).resolve()
    path = (base / name).resolve()
    if path == base or base not in path.parents:
        raise UserError(f"{name}: leads out of the folder {root}")
    return path


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _names(memory: KVMemory) -> set[str]:
    parts = [f"{kind}.{part}" for kind in ("keys", "values") for part in memory.codec.names]
    return {"next_position"} | {f"{i}.{part}" for i in range(len(memory.layers)) for part in (*parts, "positions")}


def _fill(memory: KVMemory, tensors: dict[str, torch.Tensor], dtype: torch.dtype, path: Path) -> None:
    """Put tensors into an empty memory, checking that they fit each other: an index out of range would crash later."""
    following = tensors["next_position"]
    for index, layer in enumerate(memory.layers):
        keys, values = (
            tuple(tensors[f"{index}.{kind}.{part}"] for part in memory.codec.names) for kind in ("keys", "values")
        )
        seen = tensors[f"{index}.positions"]
        shapes = {part.shape[:3] for part in (*keys, *values)}
        batch, heads, slots = next(iter(shapes))
        fits = seen.shape in {(batch, heads, slots), (batch, 1, slots)} and following.shape == (batch,)
        if len(shapes) != 1 or not fits or (seen.numel() and int(seen.min()) < -1):
            raise UserError(f"{path}: damaged: the tensors of layer {index} do not fit together")
        layer.set(keys, values, seen, dtype, padded=bool((seen < 0).any()))
    memory.adopt(following)


def _hashes(tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    """sha256 of the bytes of each tensor; hashing leaves the interpreter free, so threads share the work."""

    def one(tensor: torch.Tensor) -> str:
        flat = tensor.reshape(-1).view(torch.uint8)
        return hashlib.sha256(flat.numpy().data).hexdigest()

    with ThreadPoolExecutor() as pool:
        return dict(zip(tensors, pool.map(one, tensors.values())))
