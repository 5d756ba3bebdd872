"""Hidden states of a frozen model, computed once and read from disk ever after."""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from kvc.core.files import atomic, write_json
from kvc.errors import UserError

SHARD = 256
INDEX = "index.json"


def cache_root() -> Path:
    """`$KVC_CACHE`, else `~/.cache/kvc`; ranks on several machines need one that they share."""
    return Path(os.environ.get("KVC_CACHE") or Path.home() / ".cache" / "kvc")


class HiddenStore:
    """Memory-mapped bf16 hidden states of all reasoning tokens of all traces, one row a token.

    The folder holds one safetensors file for every `SHARD` traces and an index that is written last. Shards do not
    depend on the number of ranks that computed them, and a build that was killed goes on at the first missing shard.

    Args:
        folder: Folder of a finished store.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        try:
            self._shards = [self._open(folder / name) for name in index["shards"]]
        except (OSError, SafetensorError) as error:
            raise UserError(f"{folder}: a file of hidden states is broken ({error}): delete the folder") from error
        self._starts = torch.tensor([0, *index["rows"]]).cumsum(0)

    @staticmethod
    def _open(path: Path) -> torch.Tensor:
        with safe_open(path, framework="pt") as file:
            return file.get_tensor("hidden")

    def __len__(self) -> int:
        return int(self._starts[-1])

    def gather(self, rows: torch.Tensor) -> torch.Tensor:
        """Hidden states `[N, D]` (bf16, CPU) of the token rows `[N]`."""
        rows = rows.cpu()
        if len(self._shards) == 1:
            return self._shards[0][rows]
        shard = torch.bucketize(rows, self._starts[1:], right=True)
        out = torch.empty(len(rows), self._shards[0].shape[1], dtype=torch.bfloat16)
        for number in torch.unique(shard).tolist():
            chosen = (shard == number).nonzero().squeeze(1)
            out[chosen] = self._shards[number][rows[chosen] - self._starts[number]]
        return out


def build_store(
    folder: Path,
    lengths: Sequence[int],
    hidden: Callable[[range], torch.Tensor],
    rank: int = 0,
    world: int = 1,
) -> HiddenStore:
    """Open the store in `folder`, computing what is missing of it; ranks share the work.

    Args:
        folder: Where it is kept; its name must name model, data and template.
        lengths: Number of reasoning tokens of each trace.
        hidden: Hidden states `[sum of lengths, D]` of a range of traces, concatenated.
        rank: This process.
        world: Number of processes.

    Raises:
        UserError: If the folder cannot be written, or holds other traces.
    """
    if not _agreed(_complete(folder), world):
        ranges = [range(i, min(i + SHARD, len(lengths))) for i in range(0, len(lengths), SHARD)]
        names = [f"hidden-{number:05d}.safetensors" for number in range(len(ranges))]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            todo = [i for i in range(rank, len(ranges), world) if not (folder / names[i]).is_file()]
            _compute(folder, [(names[i], ranges[i]) for i in todo], hidden, shown=rank == 0)
        except OSError as error:
            raise UserError(f"cannot write hidden states to {folder}: {error.strerror}; set KVC_CACHE") from error
        if world > 1:
            torch.distributed.barrier()
        if rank == 0:
            rows = [sum(lengths[i] for i in part) for part in ranges]
            write_json(folder / INDEX, {"shards": names, "rows": rows})
        if world > 1:
            torch.distributed.barrier()
    store = HiddenStore(folder)
    if len(store) != sum(lengths):
        raise UserError(f"{folder}: holds {len(store)} rows, not {sum(lengths)}: delete the folder")
    return store


def _complete(folder: Path) -> bool:
    """Whether the index and every shard that it names are there."""
    index = folder / INDEX
    return index.is_file() and all((folder / name).is_file() for name in json.loads(index.read_text())["shards"])


def _agreed(value: bool, world: int) -> bool:
    """The first rank's view: another job may finish the store between two ranks' looks."""
    if world == 1:
        return value
    values = [value]
    torch.distributed.broadcast_object_list(values, src=0)
    return values[0]


def _compute(
    folder: Path, parts: Sequence[tuple[str, range]], hidden: Callable[[range], torch.Tensor], shown: bool
) -> None:
    columns = (
        TextColumn("hidden states"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("shards"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, disable=not shown) as progress:
        task = progress.add_task("", total=len(parts))
        for name, part in parts:
            states = hidden(part).to(torch.bfloat16).contiguous().cpu()
            with atomic(folder / name) as temporary:
                save_file({"hidden": states}, temporary)
            progress.advance(task)
