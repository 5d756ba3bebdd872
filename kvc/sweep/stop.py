"""The wish to stop, from the keyboard or the system."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Stop:
    """Counts how often the user or the system has asked to stop."""

    def __init__(self) -> None:
        self.times = 0

    def ask(self, number: int, frame: FrameType | None) -> None:
        """Signal handler."""
        self.times += 1

    @contextmanager
    def watching(self) -> Iterator["Stop"]:
        """Take SIGINT, SIGTERM and SIGHUP for the time of the block; what is ignored (nohup) stays ignored."""
        numbers = [n for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) != signal.SIG_IGN]
        before = {number: signal.signal(number, self.ask) for number in numbers}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
