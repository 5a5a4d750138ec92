"""Waits that notice when this process itself was stopped, say who is missing, and end."""

from __future__ import annotations

import math
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

LAP = 0.5  # seconds between two looks
_LONGEST_LAP = 1.0  # a longer one is time in which this process did not run: a suspended job, a closed lid
_FIRST_WORD = 15.0  # seconds of silence
T = TypeVar("T")


def begun(work: Callable[[], T], name: str) -> Future[T]:
    """Work in a thread of its own, since it may wait for ever, in C++ or for a disk; this process can end meanwhile."""
    answer: Future[T] = Future()

    def run() -> None:
        try:
            answer.set_result(work())
        except BaseException as error:  # raised where the result is asked for; SystemExit would end this thread
            answer.set_exception(error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return answer


class Wait:
    """One wait, in seconds in which this process could run.

    Args:
        limit: seconds after which it is over; infinite where others than the clock end it.
        missing: what is being waited for, asked when it is time to say so; "" says nothing.
    """

    def __init__(self, limit: float, missing: Callable[[], str] = str) -> None:
        self.seconds, self._limit, self._missing = 0.0, limit, missing
        self._latest, self._word = time.monotonic(), _FIRST_WORD

    def over(self) -> bool:
        """Call this at every look -> whether the limit is reached. Speaks after 15 s, 30 s, 60 s ..."""
        now = time.monotonic()
        self.seconds += min(now - self._latest, _LONGEST_LAP)
        self._latest = now
        if self.seconds >= self._word:
            self._word *= 2
            if text := self._missing():
                most = f", at most {self._limit:g} s" if math.isfinite(self._limit) else ""
                sys.stderr.write(f"mat_dist: {text} for {self.seconds:.0f} s{most}\n")
                sys.stderr.flush()
        return self.seconds > self._limit
