"""Stop requests: signals set a flag, the vote of a step makes all ranks agree on it."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from mat_dist.errors import StopRequested

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
# torchrun forwards a signal that the scheduler or the terminal has also sent to every process, up to some tenths of
# a second later: within this many seconds two signals are one request.
SAME_REQUEST = 1.0


class StopFlag:
    """Whether this process was asked to stop."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._since = 0.0
        self._count = 0

    @property
    def requested(self) -> bool:
        return self.signal is not None

    def pass_on(self) -> None:
        """Another rank was asked to stop."""
        self.signal = self.signal or signal.SIGTERM

    def take(self, number: int, frame: FrameType | None) -> None:
        """Signal handler: the first request lets the step end and be saved, the second one does not. Raises
        StopRequested: for a signal more than SAME_REQUEST s after the first, or the third one; like any local error it
        reaches the next header, so all ranks leave together and nothing half-saved becomes visible."""
        now = time.monotonic()
        self._count += 1
        if self._count == 1:
            self._since, self.signal = now, signal.Signals(number)
        elif now - self._since > SAME_REQUEST or self._count > 2:
            raise StopRequested(f"stopped at once by a second {signal.Signals(number).name}", "signal",
                                "start the same command again to continue from the newest checkpoint")


def leave_if(stop: StopFlag | None, doing: str, where: str) -> None:
    """For long work between two headers. Raises StopRequested when this process was asked to stop."""
    if stop is not None and stop.requested:
        raise StopRequested(f"stopped by a signal while {doing}", where, "start the same command again to continue")


@contextmanager
def watching() -> Iterator[StopFlag]:
    """Route SIGTERM, SIGINT and SIGUSR1 into a flag; former handlers are restored."""
    flag = StopFlag()
    before = {number: signal.signal(number, flag.take) for number in SIGNALS}
    try:
        yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
