"""Stop requests: signals set a flag, the vote of a step makes all ranks agree on it."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from mat_dist.distributed.launch import LAUNCHER_DIED, Launch
from mat_dist.errors import StopRequested

# Whatever a scheduler can be told to send, but for what means something else: faults of the program, suspending and
# going on, a child's end, a window's size, closed pipes and full disks.
_OTHERS = ("KILL", "STOP", "TSTP", "TTIN", "TTOU", "CONT", "CHLD", "WINCH", "PIPE", "XFSZ",
           "SEGV", "BUS", "FPE", "ILL", "ABRT", "SYS", "TRAP")
SIGNALS = sorted(signal.valid_signals() - {getattr(signal, f"SIG{name}", 0) for name in _OTHERS})
# The scheduler and the launcher both pass a signal on, and some schedulers repeat it: signals that follow each other
# within this many seconds are one request. People who press Ctrl-C three times mean it.
SAME_REQUEST = 1.0
LAUNCHER_GONE = "stopped since the launcher, which kept the store, is gone"
AGAIN = "start the same command again to continue"


def signal_name(number: int) -> str:
    """SIGTERM, or "signal 40" for one without a name."""
    with suppress(ValueError):
        return signal.Signals(number).name
    return f"signal {number}"


class StopFlag:
    """Whether this process was asked to stop, and by what.

    Args:
        speaks: whether it says so on the screen.
    """

    def __init__(self, speaks: bool = False) -> None:
        self.reason = ""  # empty: nobody asked
        self.leaving = False  # the run is about to end: whatever comes now is too late
        self._speaks, self._latest, self._count = speaks, 0.0, 0

    @property
    def requested(self) -> bool:
        return bool(self.reason)

    def pass_on(self, reason: str = "stopped by a signal") -> None:
        """This rank, or another one, was asked to stop."""
        if not self.reason and not self.leaving and self._speaks:
            with suppress(OSError):  # print would wait for the lock that the interrupted code may hold
                os.write(2, f"mat_dist: {reason.replace('stopped', 'asked to stop', 1)}: what is being done is "
                            "finished and saved; once more, after a second, stops at once\n".encode())
        self.reason = self.reason or reason

    def take(self, number: int, frame: FrameType | None) -> None:
        """Signal handler: the first request lets the step end and be saved, the second one does not. Raises
        StopRequested for the second request, or the third Ctrl-C; like any local error it reaches the next header, so
        all ranks leave together and nothing half-saved becomes visible."""
        now, first = time.monotonic(), not self._count
        another = now - self._latest > SAME_REQUEST
        self._latest, self._count = now, self._count + 1
        if first:
            self.pass_on(LAUNCHER_GONE if number == LAUNCHER_DIED else f"stopped by {signal_name(number)}")
        elif not self.leaving and (another or (number == signal.SIGINT and self._count > 2)):
            raise StopRequested(f"stopped at once by a second {signal_name(number)}", "signal",
                                f"{AGAIN} from the newest checkpoint")


def leave_if(stop: StopFlag | None, doing: str, where: str) -> None:
    """For long work between two headers. Raises StopRequested when this process was asked to stop."""
    if stop is not None and stop.requested:
        raise StopRequested(f"{stop.reason} while {doing}", where, AGAIN)


@contextmanager
def watching(*, leaving: bool = True) -> Iterator[StopFlag]:
    """Route signals into a flag; former handlers are restored, but after a stop those that would end this process while
    it leaves. Signals that somebody else handles stay theirs, and a hang-up that is ignored stays ignored (nohup).
    No other thread than the main one can hear signals.

    Args:
        leaving: this process ends afterwards; else all handlers are restored.
    """
    flag, before = StopFlag(Launch.from_environment().speaks_for()), {}
    for number in SIGNALS if threading.current_thread() is threading.main_thread() else ():
        handler = signal.getsignal(number)
        if handler in (signal.SIG_DFL, signal.default_int_handler) or isinstance(
                getattr(handler, "__self__", None), StopFlag) or (
                handler == signal.SIG_IGN and number != signal.SIGHUP):
            before[number] = signal.signal(number, flag.take)
    try:
        yield flag
    finally:
        flag.leaving = True
        for number, handler in before.items():
            if not (leaving and flag.requested and handler == signal.SIG_DFL):
                signal.signal(number, handler)
