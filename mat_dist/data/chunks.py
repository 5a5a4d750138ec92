"""The image file of a cache while it is being written; what a stop request interrupts is continued the next time."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mat_dist.distributed.stopping import StopFlag, leave_if

_READ = 64 << 20  # bytes hashed between two looks at the stop request


@dataclass(frozen=True)
class Chunk:
    """Decoded images (n, C, H, W) in order, and the files of the same stretch that could not be read."""

    images: np.ndarray
    skipped: tuple[str, ...]


@dataclass
class Progress:
    """How far one split is.

    Attributes:
        images: images written.
        skipped: files that were left out; with `images` it tells how many files are done.
        digest: SHA-256 of the images so far.
    """

    images: int = 0
    skipped: list[str] = field(default_factory=list)
    digest: Any = field(default_factory=hashlib.sha256)

    @property
    def files(self) -> int:
        """Files that are done."""
        return self.images + len(self.skipped)

    @property
    def sha256(self) -> str:
        """Of the images so far, hex."""
        return str(self.digest.hexdigest())


class Partial:
    """The unfinished image file of one process: the training images, then the test images.

    Args:
        folder: of the cache.
        key: name of the cache.
        image_bytes: bytes of one image.
    """

    def __init__(self, folder: Path, key: str, image_bytes: int) -> None:
        self.path = folder / f"{key}.{os.uname().nodename}.{os.getpid()}.part"
        self.splits = (Progress(), Progress())
        self._kept, self._state = folder / f"{key}.kept", folder / f"{key}.kept.json"
        self._image_bytes = image_bytes

    @property
    def nbytes(self) -> int:
        """Bytes written."""
        return sum(split.images for split in self.splits) * self._image_bytes

    def write(self, parts: Sequence[Callable[[int, int], Iterator[Chunk]]], beat: Callable[[], None]) -> None:
        """Append what is missing of both splits, with fsync. Raises OSError, and what the parts raise."""
        with open(self.path, "ab", opener=lambda path, flags: os.open(path, flags, 0o600)) as file:
            for split, part in zip(self.splits, parts, strict=True):
                for chunk in part(split.files, len(split.skipped)):
                    content = np.ascontiguousarray(chunk.images).reshape(-1).data
                    file.write(content)
                    split.digest.update(content)
                    split.images += len(chunk.images)
                    split.skipped.extend(chunk.skipped)
                    beat()
            file.flush()
            os.fsync(file.fileno())

    def keep(self) -> None:
        """Leave the file for a later process; its description comes last, so that both are whole or nothing counts."""
        os.replace(self.path, self._kept)
        state = [{"images": split.images, "skipped": split.skipped, "sha256": split.sha256} for split in self.splits]
        self.path.write_text(json.dumps(state))
        os.replace(self.path, self._state)

    def take_over(self, beat: Callable[[], None], stop: StopFlag | None) -> int:
        """Continue the file that a stopped process has left, if its bytes are still the same -> images in it.

        Raises StopRequested while the bytes are compared; the file stays.
        """
        try:
            splits = self._read(beat, stop)
            if splits is not None:
                os.replace(self._kept, self.path)
                self.splits = splits
        except FileNotFoundError:  # there is none, or another process was faster
            pass
        self._state.unlink(missing_ok=True)
        self._kept.unlink(missing_ok=True)
        return sum(split.images for split in self.splits)

    def _read(self, beat: Callable[[], None], stop: StopFlag | None) -> tuple[Progress, Progress] | None:
        """What the kept file holds, None where it is not what its description says."""
        try:
            told = [(int(one["images"]), [str(name) for name in one["skipped"]], one["sha256"])
                    for one in json.loads(self._state.read_bytes())]
        except (ValueError, KeyError, TypeError):
            return None
        if len(told) != 2 or min(images for images, _, _ in told) < 0:
            return None
        if self._kept.stat().st_size != sum(images for images, _, _ in told) * self._image_bytes:
            return None
        found = []
        with open(self._kept, "rb") as file:
            for images, skipped, sha256 in told:
                split, rest = Progress(images, skipped), images * self._image_bytes
                while content := file.read(min(rest, _READ)):
                    split.digest.update(content)
                    rest -= len(content)
                    beat()
                    leave_if(stop, "reading a half-built cache", str(self._kept))
                if split.sha256 != sha256:
                    return None
                found.append(split)
        return found[0], found[1]
