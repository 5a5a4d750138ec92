"""A store client whose calls end also when the network is cut.

c10d's TCPStore waits in recv() for an answer without a limit, and a cut cable closes no connection: the ranks of the
cut-off node would wait for ever. So one thread alone talks to the store, and who asks gives up after a while. The
thread may then stay in recv(); it is a daemon and does not keep the process from ending.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")
CLOSE_SECONDS = 1.0  # a healthy store answers within milliseconds


class StoreThread:
    """The only user of a store client.

    Args:
        store: the client.
        regularly: called with the store every `interval` s, until it raises RuntimeError (the store is gone).
        interval: seconds between two calls.
    """

    def __init__(self, store: Any, regularly: Callable[[Any], None], interval: float) -> None:
        self._store, self._regularly, self._interval = store, regularly, interval
        self._asked: queue.SimpleQueue[tuple[Callable[[Any], Any], Future[Any]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="store", daemon=True)
        self._thread.start()

    def ask(self, work: Callable[[Any], T], patience: float) -> T:
        """`work(store)` -> its result. Raises RuntimeError if the store is gone or silent for `patience` s."""
        answer: Future[T] = Future()
        self._asked.put((work, answer))
        try:
            return answer.result(timeout=patience)
        except TimeoutError:
            raise RuntimeError(f"no answer within {patience:g} s") from None

    def close(self) -> None:
        """End the thread, if the store lets it."""
        self._asked.put(None)
        self._thread.join(timeout=CLOSE_SECONDS)

    def _run(self) -> None:
        due: float | None = time.monotonic() + self._interval
        while True:
            try:
                task = self._asked.get(timeout=None if due is None else max(0.0, due - time.monotonic()))
            except queue.Empty:
                due = self._tick()
                continue
            if task is None:
                return
            work, answer = task
            try:
                answer.set_result(work(self._store))
            except Exception as error:
                answer.set_exception(error)
            if due is not None and time.monotonic() >= due:
                due = self._tick()

    def _tick(self) -> float | None:
        """Do what is done regularly -> when it is due again; never, if the store is gone."""
        try:
            self._regularly(self._store)
        except RuntimeError:
            return None
        return time.monotonic() + self._interval
