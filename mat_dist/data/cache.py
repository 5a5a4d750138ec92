"""The decoded-image cache: one file of uint8 images that all ranks of a node map, with a manifest beside it.

`<key>.u8` holds the training images, then the test images; `<key>.json` is written last and holds shapes, digests and
which files were left out. Both are made under another name and renamed, so they are whole or absent.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mat_dist.data.chunks import Chunk, Partial
from mat_dist.data.once import MakerLock
from mat_dist.distributed.stopping import StopFlag
from mat_dist.errors import DataError, OutputError, StopRequested

FORMAT = 1
DEFAULT_FOLDER = "~/.cache/mat_dist"
_PROBES, _PROBE_BYTES = 64, 1 << 16  # looked at on each start: 4 MiB instead of a whole 200 GB file
_ABANDONED = 3600.0  # seconds after which an unfinished file of a killed process is removed


@dataclass(frozen=True)
class Manifest:
    """What `<key>.json` says. `counts` are training and test images, `shape` is (C, H, W)."""

    format: int
    key: str
    counts: tuple[int, int]
    shape: tuple[int, int, int]
    image_sha256: tuple[str, str]
    skipped: tuple[tuple[str, ...], tuple[str, ...]]
    mtime_ns: int
    probe_sha256: str

    @property
    def nbytes(self) -> int:
        """Size of the image file."""
        return sum(self.counts) * int(np.prod(self.shape))


def cache_folder(setting: str | None) -> Path:
    """The folder of all caches, made with mode 0700 if it is missing.

    Raises:
        OutputError: it cannot be made, belongs to another user, or others may write into it.
    """
    folder = Path(os.path.expanduser(setting or DEFAULT_FOLDER))
    how = "set data.cache to a folder of your own"
    if folder.parts[0].startswith("~"):
        raise OutputError("there is no home folder for the cache", str(folder), how)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.stat()
    except OSError as problem:
        raise OutputError(f"cannot use the cache folder: {problem.strerror}", str(folder), how) from problem
    if status.st_uid != os.geteuid():
        raise OutputError("the cache folder belongs to another user", str(folder), how)
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):  # who can rename its files decides what is trained on
        who = "anybody" if status.st_mode & stat.S_IWOTH else "its group"
        raise OutputError(f"{who} may write into the cache folder", str(folder), f"chmod go-w {folder}, or {how}")
    return folder


@dataclass(frozen=True)
class Cache:
    """The files of one cache."""

    folder: Path
    key: str

    @property
    def image_file(self) -> Path:
        """The images, uint8."""
        return self.folder / f"{self.key}.u8"

    @property
    def manifest_file(self) -> Path:
        """JSON, written after the images."""
        return self.folder / f"{self.key}.json"

    @property
    def lock_file(self) -> Path:
        """Held by the process that builds."""
        return self.folder / f"{self.key}.lock"

    def look(self) -> tuple[Manifest | None, str]:
        """The manifest of a cache that is whole, or None and what is wrong (empty: there is none yet)."""
        try:
            text = self.manifest_file.read_bytes()
        except FileNotFoundError:
            return None, ""
        except OSError as problem:
            return None, f"its manifest cannot be read ({problem.strerror})"
        manifest = _parse(text)
        if manifest is None or manifest.key != self.key:
            return None, "its manifest is damaged or of another version"
        try:
            status = os.lstat(self.image_file)
        except OSError as problem:
            return None, f"its images cannot be read ({problem.strerror})"
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
            return None, "its image file is not a file of this user"
        if status.st_size != manifest.nbytes:
            return None, f"it has {status.st_size} bytes instead of {manifest.nbytes}"
        if status.st_mtime_ns != manifest.mtime_ns or _probe(self.image_file) != manifest.probe_sha256:
            return None, "its images were changed"
        return manifest, ""

    def open(self, manifest: Manifest) -> tuple[Tensor, Tensor]:
        """Training and test images (N, C, H, W), mapped: pages are read when they are used, and shared by processes."""
        # Copy-on-write only because torch wants writable memory; nothing writes to it.
        images = np.memmap(self.image_file, np.uint8, mode="c", shape=(sum(manifest.counts), *manifest.shape))
        both = torch.from_numpy(images)
        return both[: manifest.counts[0]], both[manifest.counts[0] :]

    def build(self, train: Callable[[int, int], Iterator[Chunk]], test: Callable[[int, int], Iterator[Chunk]], *,
              shape: tuple[int, int, int], nbytes: int, lock: MakerLock, stop: StopFlag | None = None) -> int:
        """Write the images of both splits and the manifest; memory holds one chunk at a time.

        Args:
            train, test: (first file, files left out before it) -> the images from there on.
            shape: (C, H, W).
            nbytes: what all images need.
            lock: shows the waiting processes that the work goes on.
            stop: looked at here and by `train` and `test`.

        Returns:
            How many images were there from an earlier call that was stopped.

        Raises:
            OutputError: the disk is full or fails; nothing is left behind.
            DataError: a split has no image left.
            StopRequested: asked to stop; what is written is kept for the next call, and no reader sees it.
        """
        _remove_abandoned(self.folder, self.key)
        part = Partial(self.folder, self.key, int(np.prod(shape)))
        with _disk_errors(self.folder, nbytes):
            done = part.take_over(lock.beat, stop)
            missing, free = nbytes - part.nbytes, shutil.disk_usage(self.folder).free
            if free < missing:
                raise OSError(errno.ENOSPC, f"{free / 2**30:.1f} GiB are free")
            try:
                part.write((train, test), lock.beat)
                if any(split.images == 0 for split in part.splits):
                    raise DataError("no image could be read", str(self.folder), "see the notes on skipped files")
                self._publish(part, shape)
            except StopRequested:
                with contextlib.suppress(OSError):  # what cannot be kept is decoded again
                    part.keep()
                raise
            finally:
                part.path.unlink(missing_ok=True)
        return done

    def _publish(self, part: Partial, shape: tuple[int, int, int]) -> None:
        """Give the finished images their name, then the manifest."""
        train, test = part.splits
        manifest = Manifest(FORMAT, self.key, (train.images, test.images), shape, (train.sha256, test.sha256),
                            (tuple(train.skipped), tuple(test.skipped)), part.path.stat().st_mtime_ns,
                            _probe(part.path))
        os.replace(part.path, self.image_file)
        part.path.write_bytes(_dump(manifest))
        os.replace(part.path, self.manifest_file)


@contextlib.contextmanager
def _disk_errors(folder: Path, nbytes: int) -> Iterator[None]:
    """Errors of the cache's disk as OutputError, with what is needed."""
    try:
        yield
    except OSError as problem:
        raise OutputError(f"cannot write a cache of {nbytes / 2**30:.1f} GiB: {problem.strerror or problem}",
                          str(folder), "free space there, or set data.cache to a folder on another disk") from problem


def _probe(path: Path) -> str:
    """SHA-256 of 64 evenly spaced stretches of the file."""
    digest, size = hashlib.sha256(), path.stat().st_size
    with open(path, "rb") as file:
        for place in range(_PROBES):
            file.seek(max(size - _PROBE_BYTES, 0) * place // (_PROBES - 1))
            digest.update(file.read(_PROBE_BYTES))
    return digest.hexdigest()


def _dump(manifest: Manifest) -> bytes:
    """The manifest as JSON, with its own SHA-256."""
    content = json.dumps(asdict(manifest), sort_keys=True)
    return json.dumps({"manifest": content, "sha256": hashlib.sha256(content.encode()).hexdigest()}).encode()


def _parse(text: bytes) -> Manifest | None:
    """The manifest in `text`, or None where it is damaged."""
    try:
        outer = json.loads(text)
        content = outer["manifest"]
        if hashlib.sha256(content.encode()).hexdigest() != outer["sha256"]:
            return None
        fields = json.loads(content)
        if fields["format"] != FORMAT:
            return None
        counts, shape, digests = (tuple(fields[name]) for name in ("counts", "shape", "image_sha256"))
        train_skipped, test_skipped = (tuple(names) for names in fields["skipped"])
        return Manifest(FORMAT, fields["key"], counts, shape, digests, (train_skipped, test_skipped),
                        fields["mtime_ns"], fields["probe_sha256"])
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def _remove_abandoned(folder: Path, key: str) -> None:
    """Remove unfinished files that a killed process left."""
    for part in folder.glob(f"{key}.*.part"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - part.stat().st_mtime > _ABANDONED:
                part.unlink()
