"""One cell as a process: its own group, its output in a log, ended when the sweep ends, however that ends."""

import ctypes
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

PROGRAM = (sys.executable, "-m", "kvc")
SHOWN = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")
DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of prctl(2)


class CellProcess:
    """A started command.

    Args:
        argv: Words after the program.
        env: Its whole environment.
        log: File that its output is added to, below a line that repeats the command.
        program: What is run; None is `python -m kvc`.
        deaf: Signals that it ignores.
    """

    def __init__(
        self,
        argv: Sequence[str],
        env: Mapping[str, str],
        log: Path,
        program: Sequence[str] | None = None,
        deaf: Sequence[signal.Signals] = (),
    ) -> None:
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as file:
            shown = " ".join(f"{name}={env[name]}" for name in SHOWN if name in env)
            stamp = time.strftime("%Y-%m-%d %H:%M:%S")
            file.write(f"\n# {stamp}\n$ {shown} {shlex.join(['python', '-m', 'kvc', *argv])}\n".encode())
            file.flush()
            self.begin = file.tell()
            self.popen = subprocess.Popen(
                [*(program or PROGRAM), *argv],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=dict(env),
                start_new_session=True,  # Ctrl-C goes to the sweep alone, which passes it on once
                preexec_fn=_prepare(deaf),
            )

    def poll(self) -> int | None:
        """Exit code, negative for a signal, or None while it runs; what it left behind in its group is killed."""
        code = self.popen.poll()
        if code is not None:
            self._signal_group(signal.SIGKILL)
        return code

    def ended(self) -> bool:
        """Whether it has ended; safe inside a signal handler, which may have interrupted `poll`."""
        if self.popen.returncode is not None:
            return True
        try:
            flags = os.WEXITED | os.WNOHANG | os.WNOWAIT
            return os.waitid(os.P_PID, self.popen.pid, flags) is not None
        except ChildProcessError:
            return True

    def terminate(self) -> None:
        """Ask it to save its work and end. Only the leader is asked: without its loader workers it could not save."""
        if not self.ended():
            os.kill(self.popen.pid, signal.SIGTERM)

    def kill(self) -> None:
        """End the whole group now."""
        self._signal_group(signal.SIGKILL)

    def tail(self, count: int = 12) -> list[str]:
        """The last lines that it wrote."""
        return tail(self.log, self.begin, count)

    def _signal_group(self, number: int) -> None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.popen.pid, number)


def tail(log: Path, begin: int = 0, count: int = 12, most: int = 8192) -> list[str]:
    """The last non-empty lines of a log after the byte `begin`; of a line rewritten in place, its last state."""
    try:
        with log.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(begin, size - most))
            text = file.read().decode("utf-8", errors="replace")
    except OSError:
        return []
    lines = [line.rstrip().rsplit("\r", 1)[-1].rstrip() for line in text.split("\n")]
    return [line for line in lines if line][-count:]


def _prepare(deaf: Sequence[signal.Signals]) -> Callable[[], None]:
    """What the child does before it becomes the program: on Linux, ask for SIGTERM when this process dies."""
    library = ctypes.CDLL(None) if sys.platform.startswith("linux") else None

    def prepare() -> None:
        if library is not None:
            library.prctl(DEATH_SIGNAL, signal.SIGTERM)
        for number in deaf:
            signal.signal(number, signal.SIG_IGN)

    return prepare
