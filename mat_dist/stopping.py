"""Stop requests: signals set a flag, the vote of a step makes all ranks agree on it."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopFlag:
    """Whether this process was asked to stop; the second request of one kind ends it at once."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    @property
    def requested(self) -> bool:
        return self.signal is not None

    def pass_on(self) -> None:
        """Another rank was asked to stop."""
        self.signal = self.signal or signal.SIGTERM

    def take(self, number: int, frame: FrameType | None) -> None:
        """Signal handler: remember; work goes on to the end of the step."""
        self.signal = signal.Signals(number)


@contextmanager
def watching() -> Iterator[StopFlag]:
    """Route SIGTERM, SIGINT and SIGUSR1 into a flag; former handlers are restored.

    torchrun forwards a signal that the scheduler may also have sent to each process, so a second one within a
    step means nothing.
    """
    flag = StopFlag()
    before = {number: signal.signal(number, flag.take) for number in SIGNALS}
    try:
        yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
