"""Files that ranks share (caches, downloads): one process makes them, the others wait.

The maker holds a lock file and touches it while it works. Nobody compares clocks of two machines: a lock is dead when
it has not changed for a while of the watcher's own time, or when its process is gone from this host. Two makers at
once would be harmless, as files come into place whole, by renaming.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from mat_dist.distributed.stopping import StopFlag, leave_if
from mat_dist.errors import DataError, OutputError

T = TypeVar("T")
PATIENCE = 120.0  # seconds without a sign of life; 1024 images from a slow network disk take some 20 s
GRACE = 5.0  # seconds in which another maker may follow one that gave up
_BEAT = 1.0  # seconds between two touches of the lock


class MakerLock:
    """The lock file of the process that makes something; a context manager that removes it."""

    def __init__(self, path: Path, token: str) -> None:
        self._path, self._token, self._last = path, token, time.monotonic()

    def beat(self) -> None:
        """Show that the work goes on; cheap to call often."""
        if time.monotonic() - self._last > _BEAT:
            self._last = time.monotonic()
            if _read(self._path) == self._token:
                os.utime(self._path)

    def __enter__(self) -> MakerLock:
        return self

    def __exit__(self, *_: object) -> None:
        if _read(self._path) == self._token:
            self._path.unlink(missing_ok=True)


def take_lock(path: Path) -> MakerLock | None:
    """The lock at `path`, or None where another process holds it. Raises OutputError where it cannot be written."""
    token = f"{socket.gethostname()} {os.getpid()} {time.monotonic_ns()}"
    try:
        handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    except FileExistsError:
        return None
    except OSError as problem:
        raise OutputError(f"cannot write: {problem.strerror}", str(path.parent), "choose a folder that you may write") \
            from problem
    with os.fdopen(handle, "w") as file:
        file.write(token)
    return MakerLock(path, token)


def _read(path: Path) -> str:
    """Host, process and time of the lock's holder; empty where there is no lock."""
    try:
        return path.read_text()
    except OSError:
        return ""


def _holder_is_gone(path: Path) -> bool:
    """The lock's process was on this host and has ended."""
    host, _, rest = _read(path).partition(" ")
    process = rest.partition(" ")[0]
    if host != socket.gethostname() or not process.isdigit():
        return False
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


class _Watch:
    """For how long a lock has shown no sign of life, by our own clock."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen, self._since = self._look(), time.monotonic()
        self._held = self._seen is not None

    def _look(self) -> tuple[int, int] | None:
        try:
            status = self._path.stat()
        except OSError:
            return None
        self._held = True
        return status.st_ino, status.st_mtime_ns

    def given_up(self) -> bool:
        """The lock was held when we last looked at it, and is gone since a few seconds."""
        return self._held and self.silent() > GRACE and self._seen is None

    def silent(self) -> float:
        """Seconds since the lock last changed."""
        seen = self._look()
        if seen != self._seen:
            self._seen, self._since = seen, time.monotonic()
        return time.monotonic() - self._since


def once(ready: Callable[[], T | None], make: Callable[[MakerLock], None], lock: Path, *, build: bool, what: str,
         patience: float = PATIENCE, poll: float = 0.2, stop: StopFlag | None = None) -> T:
    """What `ready` returns, as soon as that is not None; at most one process runs `make` meanwhile.

    Args:
        ready: looks for a finished product; called often.
        make: makes it, and calls `beat` of the lock now and then.
        lock: path of the lock file, in a folder that exists.
        build: this process may make it; others only wait.
        what: name of the product in the message.
        patience: seconds without a sign of life of a maker, after which a builder takes over and a waiter gives up.
        poll: seconds between looks.
        stop: looked at while waiting; `make` looks for itself.

    Raises:
        DataError: no process makes it.
        StopRequested: this process was asked to stop.
        OutputError: the lock's folder cannot be written.
    """
    watch = _Watch(lock)
    while True:
        found = ready()
        if found is not None:
            return found
        if build:
            if _holder_is_gone(lock) or watch.silent() > patience:
                lock.unlink(missing_ok=True)
            taken = take_lock(lock)
            if taken is not None:
                with taken:
                    found = ready()  # another process may have finished between our look and our lock
                    if found is None:
                        make(taken)
                        found = ready()
                    if found is None:
                        raise OutputError(f"{what} was written but does not read back", str(lock.parent),
                                          "check that disk, or use another folder")
                    return found
        elif watch.given_up() or watch.silent() > patience:
            raise DataError(f"{what} is missing, the process that makes it stopped or did not start", str(lock.parent),
                            "look into the log of the first rank of this node, it prepares shared files")
        leave_if(stop, f"waiting for {what}", str(lock.parent))
        time.sleep(poll)
