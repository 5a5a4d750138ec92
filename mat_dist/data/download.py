"""Downloads of the data sets that torchvision knows, made once per shared folder."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from pathlib import Path
from typing import TypeVar

from mat_dist.data.once import MakerLock, once
from mat_dist.distributed.stopping import StopFlag, leave_if
from mat_dist.errors import DataError

T = TypeVar("T")
MOST_BYTES = 1 << 30  # of one file; the largest real one has 182 MB


def fetch_once(found: Callable[[], T | None], sources: Sequence[tuple[str, str, str]], folder: Path, *, build: bool,
               name: str, stop: StopFlag | None = None) -> T:
    """What `found` returns after the files of `sources` (url, file name, MD5) are in `folder`.

    Files come into place whole. A process with build=False waits for the one that downloads.

    Raises:
        DataError: no network, a wrong file, or nobody downloads.
        OutputError: the folder cannot be written.
        StopRequested: this process was asked to stop; files that are whole stay.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise DataError(f"cannot make the folder: {problem.strerror}", str(folder), "choose another data.root") \
            from problem

    def make(lock: MakerLock) -> None:
        for url, filename, md5 in sources:
            _fetch(url, folder, filename, md5, lock, stop)

    return once(found, make, folder / f".mat_dist-{name}.lock", build=build, what=f"the download of {name}", stop=stop)


def _fetch(url: str, folder: Path, filename: str, md5: str, lock: MakerLock, stop: StopFlag | None) -> None:
    """Download one file under another name and rename it."""
    from torchvision.datasets.utils import download_url  # imports much, and only a download needs it

    if (folder / filename).exists():
        return
    part = f".{filename}.{os.getpid()}.part"
    download = _in_background(lambda: download_url(url, folder, part, md5))
    try:
        while not wait([download], timeout=0.2).done:
            lock.beat()
            leave_if(stop, f"downloading {filename}", url)
            if (folder / part).exists() and (folder / part).stat().st_size > MOST_BYTES:
                raise RuntimeError(f"more than {MOST_BYTES} bytes")
        download.result()
        os.replace(folder / part, folder / filename)
    except (OSError, RuntimeError) as problem:  # URLError is an OSError; a wrong checksum is a RuntimeError
        raise DataError(f"cannot download {url} ({problem})", f"data.root={folder}",
                        f"copy {filename} into that folder from a machine with a network") from problem
    finally:
        (folder / part).unlink(missing_ok=True)


def _in_background(work: Callable[[], None]) -> Future[None]:
    """`work` in a thread that does not keep the process alive: torchvision's download returns only at its end."""
    future: Future[None] = Future()

    def run() -> None:
        try:
            work()
            future.set_result(None)
        except BaseException as error:  # whatever it is, the caller gets it
            future.set_exception(error)

    threading.Thread(target=run, name="download", daemon=True).start()
    return future
