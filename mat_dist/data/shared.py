"""Files that ranks share (downloads, caches): one process makes them, the others wait.

A lock of the kernel says who makes them: it is freed when a process ends, however it ends, and what a lock file holds
or whose it was means nothing. Two makers at once, where a shared disk has no locks, are harmless: files come into place
whole, by renaming.
"""

from __future__ import annotations

import errno
import fcntl
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import wait
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from mat_dist.distributed.stopping import StopFlag, leave_if
from mat_dist.distributed.waiting import begun
from mat_dist.errors import DataError, OutputError

T = TypeVar("T")
Source = tuple[str, str, str]  # url, file name, MD5
MOST_BYTES = 1 << 30  # of one file; the largest real one has 182 MB
PATIENCE = 120.0  # seconds that a process waits for a maker that does not begin
GRACE = 5.0  # seconds in which another maker may follow one that gave up
FIRST, EVERY = 5.0, 30.0  # seconds until long work speaks, and between two of its lines


class Voice:
    """Says how far long work is, on one process of a node."""

    def __init__(self, speaks: bool) -> None:
        self.due = time.monotonic() + FIRST if speaks else math.inf

    def tell(self, text: str) -> None:
        """A line, if one is due."""
        if (now := time.monotonic()) >= self.due:
            self.due = now + EVERY
            print(f"mat_dist: {text}", file=sys.stderr, flush=True)


def once(ready: Callable[[], T | None], make: Callable[[], None], lock: Path, *, build: bool, what: str,
         poll: float = 0.2, stop: StopFlag | None = None) -> T:
    """What `ready` returns, as soon as that is not None; at most one process runs `make` meanwhile.

    Args:
        ready: looks for a finished product; called often.
        lock: the lock file, which stays.
        build: this process may make it; others only wait.
        what: name of the product in messages.
        poll: seconds between looks.
        stop: looked at while waiting; `make` looks for itself.

    Raises:
        DataError: no process makes it.
        OutputError: the lock's folder cannot be written, or what was made does not read back.
        StopRequested: this process was asked to stop.
    """
    deadline, voice = time.monotonic() + PATIENCE, Voice(build)
    while (found := ready()) is None:
        with _alone(lock, build) as alone:
            if alone and build:
                return _made(ready, make, lock, what)
        if not alone:
            deadline = time.monotonic() + GRACE
        if not build and time.monotonic() > deadline:
            raise DataError(f"{what} is missing, the process that makes it stopped or did not start", str(lock.parent),
                            "look into the log of the first rank of this node, it prepares shared files")
        leave_if(stop, f"waiting for {what}", str(lock.parent))
        voice.tell(f"waiting for {what}: a process that lives makes it and holds {lock}")
        time.sleep(poll)
    return found


@contextmanager
def _alone(lock: Path, build: bool) -> Iterator[bool]:
    """Whether no maker has the lock, which this process takes if it may `build`; others only look, side by side.
    Raises OutputError where its file cannot be written."""
    try:
        file = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as problem:
        raise OutputError(f"cannot write: {problem.strerror}", str(lock.parent), "choose a folder that you may write") \
            from problem
    try:
        try:
            fcntl.flock(file, (fcntl.LOCK_EX if build else fcntl.LOCK_SH) | fcntl.LOCK_NB)
            alone = True
        except OSError as problem:  # another one has it, or the disk has no locks
            alone = problem.errno not in (errno.EACCES, errno.EAGAIN)
        yield alone
    finally:
        os.close(file)


def _made(ready: Callable[[], T | None], make: Callable[[], None], lock: Path, what: str) -> T:
    if (found := ready()) is None:  # another process may have finished between our look and our lock
        make()
        found = ready()
    if found is None:
        raise OutputError(f"{what} was written but does not read back", str(lock.parent),
                          "check that disk, or use another folder")
    return found


def fetch_once(found: Callable[[], T | None], sources: Sequence[Source], folder: Path, *, build: bool, name: str,
               stop: StopFlag | None = None) -> T:
    """What `found` returns after the files of `sources` are in `folder`; those that are whole stay after a stop. Raises
    as `once`, and DataError where there is no network, or a wrong file."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise DataError(f"cannot make the folder: {problem.strerror}", str(folder), "choose another data.root") \
            from problem

    def make() -> None:
        for source in sources:
            _fetch(source, folder, stop)

    return once(found, make, folder / f".mat_dist-{name}.lock", build=build, what=f"the download of {name}", stop=stop)


def _fetch(source: Source, folder: Path, stop: StopFlag | None) -> None:
    """Download one file under another name and rename it. torchvision's function returns only at its end."""
    from torchvision.datasets.utils import download_url  # imports much, and only a download needs it

    url, filename, md5 = source
    part = folder / f".{filename}.{os.getpid()}.part"
    if (folder / filename).exists():
        return
    download = begun(lambda: download_url(url, folder, part.name, md5), "download")
    try:
        while not wait([download], 0.2).done:
            leave_if(stop, f"downloading {filename}", url)
            if part.exists() and part.stat().st_size > MOST_BYTES:
                raise RuntimeError(f"more than {MOST_BYTES} bytes")
        download.result()
        os.replace(part, folder / filename)
    except (OSError, RuntimeError) as problem:  # URLError is an OSError; a wrong checksum is a RuntimeError
        raise DataError(f"cannot download {url} ({problem})", f"data.root={folder}",
                        f"copy {filename} into that folder from a machine with a network") from problem
    finally:
        part.unlink(missing_ok=True)
