"""The decoded-image cache: one file of uint8 images that all ranks of a node map, with a manifest beside it.

`<key>.u8` holds the training images, then the test images; `<key>.json` is written last and holds digests and which
files were left out. Both are made under another name and renamed, so they are whole or absent.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import stat
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from mat_dist.errors import OutputError

DEFAULT_FOLDER = "~/.cache/mat_dist"
MORE_SPACE = "free space there, or set data.cache to a folder on another disk"
_PROBES, _PROBE_BYTES = 64, 1 << 16  # looked at on each start: 4 MiB instead of a whole 200 GB file


@dataclass(frozen=True)
class Chunk:
    """Decoded images (n, C, H, W) in order, the files of the same stretch that could not be read, and what was
    converted: how many images of each kind."""

    images: np.ndarray
    skipped: list[str]
    told: Counter[str]


@dataclass(frozen=True)
class Manifest:
    """What `<key>.json` says of the training and the test images: SHA-256 and the files that were left out; what was
    converted; when the image file was written; and a digest of all this and of 64 stretches of the images."""

    image_sha256: tuple[str, str]
    skipped: tuple[tuple[str, ...], tuple[str, ...]]
    told: dict[str, int]
    mtime_ns: int
    seal: str

    @classmethod
    def parse(cls, text: bytes) -> Manifest | None:
        """The manifest that was written as JSON, None for something else; only the seal tells whether it is whole."""
        with suppress(ValidationError):
            return TypeAdapter(cls).validate_json(text)
        return None

    def sealed(self, images: Path) -> Manifest:
        """The same with the digest as it should be."""
        digest, size = hashlib.sha256(json.dumps(asdict(replace(self, seal=""))).encode()), images.stat().st_size
        with open(images, "rb") as file:
            for place in range(_PROBES):
                file.seek(max(size - _PROBE_BYTES, 0) * place // (_PROBES - 1))
                digest.update(file.read(_PROBE_BYTES))
        return replace(self, seal=digest.hexdigest())


def cache_folder(setting: str | None) -> Path:
    """The folder of all caches, made with mode 0700 if it is missing. Raises OutputError where it cannot be made,
    belongs to another user, or others may write into it."""
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


class Cache:
    """The cache `key`, in the folder of all caches, of so many training and test files with images of shape (C, H, W).
    The process that builds holds `lock_file`; `nbytes` are those of the images where none is left out."""

    def __init__(self, folder: Path, key: str, files: tuple[int, int], shape: tuple[int, int, int]) -> None:
        self.folder, self.key, self.files, self.shape = folder, key, files, shape
        self.image_file, self.lock_file = folder / f"{key}.u8", folder / f"{key}.lock"
        self.nbytes = sum(files) * math.prod(shape)

    def look(self) -> tuple[Manifest | None, str]:
        """The manifest of a cache that is whole, or None and what is wrong (empty: there is none yet)."""
        try:
            manifest = Manifest.parse(self.image_file.with_suffix(".json").read_bytes())
        except FileNotFoundError:
            return None, ""
        except OSError as problem:
            return None, f"its manifest cannot be read ({problem.strerror})"
        if manifest is None:
            return None, "its manifest is damaged or of another version"
        try:
            status = os.lstat(self.image_file)
            if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
                return None, "its image file is not a file of this user"
            wanted = sum(self._counts(manifest)) * math.prod(self.shape)
            if status.st_size != wanted:
                return None, f"it has {status.st_size} bytes instead of {wanted}"
            if status.st_mtime_ns != manifest.mtime_ns or manifest.sealed(self.image_file) != manifest:
                return None, "its images or its manifest were changed"
        except OSError as problem:
            return None, f"its images cannot be read ({problem.strerror})"
        return manifest, ""

    def _counts(self, manifest: Manifest) -> tuple[int, int]:
        train, test = (count - len(gone) for count, gone in zip(self.files, manifest.skipped, strict=True))
        return train, test

    def open(self, manifest: Manifest) -> tuple[Tensor, Tensor]:
        """Training and test images (N, C, H, W), mapped: pages are read when they are used, and shared by processes."""
        train, test = self._counts(manifest)
        # Copy-on-write only because torch wants writable memory; nothing writes to it.
        both = torch.from_numpy(np.memmap(self.image_file, np.uint8, mode="c", shape=(train + test, *self.shape)))
        return both[:train], both[train:]

    def check_space(self) -> None:
        free = shutil.disk_usage(self.folder).free
        if free < self.nbytes:
            raise OutputError(f"the cache of decoded images needs {self.nbytes / 2**30:.1f} GiB, {free / 2**30:.1f} "
                              "GiB are free", str(self.folder), MORE_SPACE)

    def build(self, train: Iterable[Chunk], test: Iterable[Chunk]) -> None:
        """Write the images of both splits and the manifest; memory holds one chunk at a time, and an error leaves
        nothing behind. Raises OutputError for a full disk, or whatever `train` and `test` raise."""
        part = self.folder / f"{self.key}.{os.uname().nodename}.part"  # a node has one builder, so a killed one left it
        try:
            part.unlink(missing_ok=True)
            self.check_space()
            with open(part, "wb", opener=_private) as file:
                (train_sha, train_gone, told), (test_sha, test_gone, more) = (_write(file, split)
                                                                              for split in (train, test))
                file.flush()
                os.fsync(file.fileno())
            manifest = Manifest((train_sha, test_sha), (train_gone, test_gone), dict(told + more),
                                part.stat().st_mtime_ns, seal="").sealed(part)
            os.replace(part, self.image_file)
            with open(part, "w", opener=_private) as file:
                json.dump(asdict(manifest), file)
            os.replace(part, self.image_file.with_suffix(".json"))
        except OSError as problem:
            raise OutputError(f"cannot write a cache of {self.nbytes / 2**30:.1f} GiB: {problem.strerror or problem}",
                              str(self.folder), MORE_SPACE) from problem
        finally:
            part.unlink(missing_ok=True)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _write(file: BinaryIO, chunks: Iterable[Chunk]) -> tuple[str, tuple[str, ...], Counter[str]]:
    """Append the images -> their SHA-256, the files that were left out, what was converted."""
    digest, skipped, told = hashlib.sha256(), list[str](), Counter[str]()
    for chunk in chunks:
        content = np.ascontiguousarray(chunk.images).reshape(-1).data
        file.write(content)
        digest.update(content)
        skipped += chunk.skipped
        told += chunk.told
    return digest.hexdigest(), tuple(skipped), told
