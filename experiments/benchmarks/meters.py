"""What one call takes: seconds, and memory beyond what is there before it."""

import gc
import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

Arm = Callable[[], Any]


def timed(arm: Arm, device: str) -> dict[str, float]:
    """Seconds of one call, on the wall and of the processor."""
    if device == "cuda":
        torch.cuda.synchronize()
    wall, processor = time.perf_counter(), time.process_time()
    arm()
    if device == "cuda":
        torch.cuda.synchronize()
    return {"wall": time.perf_counter() - wall, "processor": time.process_time() - processor}


def peak_of(arm: Arm, device: str) -> int:
    """Bytes that one call needs beyond what is there before it: allocated ones on a GPU, else those of the process."""
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        arm()
        return torch.cuda.max_memory_allocated() - before
    # Writing 5 resets the high-water mark, which imports have left far above what is in use.
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = _status_bytes("VmRSS")
    arm()
    return _status_bytes("VmHWM") - before


def _status_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


def in_child(function: Callable[..., Any], *arguments: Any, give_back: bool = False) -> Any:
    """What a function returns in a process of its own, with as many threads as this one.

    Args:
        function: Of a module, so that it can be sent.
        *arguments: Of it.
        give_back: Freed memory goes back to the system at once.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_answer, args=(sender, torch.get_num_threads(), function, arguments))
    if give_back:
        # Read by the C library when a process starts.
        os.environ |= dict.fromkeys(("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"), "65536")
    child.start()
    sender.close()
    try:
        return receiver.recv()
    finally:
        child.join()


def _answer(pipe: Any, threads: int, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(threads)
    pipe.send(function(*arguments))
