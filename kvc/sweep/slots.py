"""Slots: the places on this machine where a cell can run, a GPU each or a share of the CPU."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from kvc.errors import UserError

CPU = re.compile(r"cpu:(\d+)")
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
NOT_INHERITED = (
    *("SLURM_", "SBATCH_", "SRUN_", "TORCHELASTIC_", "PL_GLOBAL_SEED", "MASTER_ADDR", "MASTER_PORT"),
    *("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "WORLD_SIZE"),
)
"""Starts of variables that a cell must not see: Lightning would take itself for a task of the surrounding job."""


@dataclass(frozen=True)
class Slot:
    """A place for one process.

    Attributes:
        name: `0` or another id of a GPU, or `cpu0`.
        gpu: The id that the driver gives to the GPU; None on the CPU.
    """

    name: str
    gpu: str | None = None


def parse_slots(text: str | None, gpus: list[str]) -> list[Slot]:
    """Slots of a command line.

    Args:
        text: GPU ids with commas (one given twice takes two cells), or `cpu:N`; None takes every GPU, else one CPU.
        gpus: Ids of the GPUs of this machine that may be used.

    Raises:
        UserError: If there are no slots, or the text says something else.
    """
    if text is None:
        text = ",".join(gpus) or "cpu:1"
    if match := CPU.fullmatch(text.strip()):
        names = [Slot(f"cpu{number}") for number in range(int(match[1]))]
    else:
        ids = [part.strip() for part in text.split(",") if part.strip()]
        if wrong := [part for part in ids if not re.fullmatch(r"\d+|(?:GPU|MIG)-[\w/-]+", part)]:
            raise UserError(f"--slots {text}: '{wrong[0]}' is no GPU id; write 0,1,2,3 or cpu:2")
        names = [Slot(gpu, gpu) for gpu in ids]
    if not names:
        raise UserError(f"--slots {text or repr(text)}: no slots; write 0,1,2,3 or cpu:2")
    return names


def visible_gpus() -> list[str]:
    """Ids of the GPUs that this process may use."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [part.strip() for part in given.split(",") if part.strip() and part.strip() != "-1"]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]


def environment(slots: list[Slot], total: int, inherited: Mapping[str, str]) -> dict[str, str]:
    """Variables of a process that runs on `slots`, out of `total` slots of this machine.

    A GPU is the only one that the process sees, by the number that `nvidia-smi` shows; threads are divided by slots.
    """
    env = {key: value for key, value in inherited.items() if not key.startswith(NOT_INHERITED)}
    env["CUDA_VISIBLE_DEVICES"] = ",".join(slot.gpu for slot in slots if slot.gpu is not None)
    env["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
    share = max(1, len(os.sched_getaffinity(0)) * len(slots) // total) if hasattr(os, "sched_getaffinity") else 1
    for name in THREADS:
        given = inherited.get(name, "")
        env[name] = str(min(share, int(given)) if given.isdigit() and int(given) else share)
    env["PYTHONUNBUFFERED"] = "1"
    return env


class Pool:
    """Slots, and who holds them.

    Args:
        slots: All slots.
    """

    def __init__(self, slots: list[Slot]) -> None:
        self.slots = slots
        self.free = list(slots)

    def fits(self, count: int) -> bool:
        """Whether a cell of `count` slots can ever run here."""
        return count <= len({slot.name for slot in self.slots})

    def take(self, count: int) -> list[Slot]:
        """Take `count` different slots; none if there are not enough at the moment."""
        different = list({slot.name: slot for slot in reversed(self.free)}.values())[::-1][:count]
        if len(different) < count:
            return []
        for slot in different:
            self.free.remove(slot)
        return different

    def give(self, slots: list[Slot]) -> None:
        """Give slots back."""
        held = [slot for slot in self.slots if slot in self.free or slot in slots]
        self.free = sorted([*self.free, *slots], key=held.index)
