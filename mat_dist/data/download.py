"""Downloads of the data sets that torchvision knows, made once per shared folder."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from mat_dist.data.once import MakerLock, once
from mat_dist.errors import DataError

T = TypeVar("T")


def fetch_once(found: Callable[[], T | None], sources: Sequence[tuple[str, str, str]], folder: Path, *, build: bool,
               name: str) -> T:
    """What `found` returns after the files of `sources` (url, file name, MD5) are in `folder`.

    Files come into place whole. A process with build=False waits for the one that downloads.

    Raises:
        DataError: no network, a wrong file, or nobody downloads.
        OutputError: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise DataError(f"cannot make the folder: {problem.strerror}", str(folder), "choose another data.root") \
            from problem

    def make(lock: MakerLock) -> None:
        done = threading.Event()
        # torchvision's download returns only at the end: a thread shows the waiting ranks that it goes on.
        pulse = threading.Thread(target=_pulse, args=(lock, done), daemon=True)
        pulse.start()
        try:
            for url, filename, md5 in sources:
                _fetch(url, folder, filename, md5)
        finally:
            done.set()
            pulse.join()

    return once(found, make, folder / f".mat_dist-{name}.lock", build=build, what=f"the download of {name}")


def _pulse(lock: MakerLock, done: threading.Event) -> None:
    while not done.wait(2.0):
        lock.beat()


def _fetch(url: str, folder: Path, filename: str, md5: str) -> None:
    """Download one file under another name and rename it."""
    from torchvision.datasets.utils import download_url  # imports much, and only a download needs it

    if (folder / filename).exists():
        return
    part = f".{filename}.{os.getpid()}.part"
    try:
        download_url(url, folder, part, md5)
        os.replace(folder / part, folder / filename)
    except (OSError, RuntimeError) as problem:  # URLError is an OSError; a wrong checksum is a RuntimeError
        raise DataError(f"cannot download {url} ({problem})", f"data.root={folder}",
                        f"copy {filename} into that folder from a machine with a network") from problem
    finally:
        (folder / part).unlink(missing_ok=True)
