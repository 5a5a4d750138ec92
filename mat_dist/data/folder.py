"""`folder`: images on disk as train/CLASS/* and test/CLASS/*, decoded into memory or into a cache."""

from __future__ import annotations

import hashlib
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mat_dist.config.schema import DataConfig
from mat_dist.data.cache import Cache, Chunk, Manifest, cache_folder
from mat_dist.data.decode import read_image
from mat_dist.data.images import ImageSet, MappedFile, RawData, check_memory, register_dataset, root_of
from mat_dist.data.listing import LAYOUT, Listing, list_images
from mat_dist.data.shared import Voice, once
from mat_dist.distributed.stopping import StopFlag, leave_if
from mat_dist.errors import DataError, MatError

# Above either, residency auto maps a cache: every rank would fill its own memory, and decode all files at each start
# (60 000 JPEGs of 32x32 take 13 s of one core, the cache of them opens in under a second).
MMAP_BYTES = 2 << 30
MMAP_FILES = 10_000
SKIP_SHARE = 0.001  # of the files of a split may be unreadable with on_bad=skip,
SKIP_FEW, SKIP_FEW_SHARE = 10, 0.05  # or so many, where they are no more than this share, or a single one
LOOKED_AT = 16  # images that are decoded for a dry run
DECODING = 2  # a cache that other rules have decoded has another name
_CHUNK_BYTES, _CHUNK_FILES = 64 << 20, 1024  # decoded at a time
_BLOCK = 16  # files that a thread takes at once


@dataclass(frozen=True)
class Decoder:
    """How the files of a folder become arrays, all of them of `shape` (3, H, W)."""

    listing: Listing
    config: DataConfig
    shape: tuple[int, int, int]

    @classmethod
    def open(cls, config: DataConfig, stop: StopFlag | None = None, *, tell: bool = True) -> Decoder:
        """List `data.root`; the shape is `data.image_size`, or that of the first image that can be read. Raises
        DataError, StopRequested."""
        listing, side = list_images(root_of(config, LAYOUT), stop, Voice(tell)), config.image_size
        if side is not None:
            return cls(listing, config, (3, side, side))
        for name in listing.train.files[: 100 if config.on_bad == "skip" else 1]:
            found = _attempt(listing.root / name, None)[0]
            if not isinstance(found, str):
                return cls(listing, config, (found.shape[2], *found.shape[:2]))
        raise DataError(f"cannot read the image ({found})", str(listing.root / name), "repair or remove it")

    @property
    def maps(self) -> bool:
        """Whether the images are mapped from a cache: asked for, or many of them and residency auto."""
        large = self.listing.count * math.prod(self.shape) > MMAP_BYTES or self.listing.count > MMAP_FILES
        return self.config.residency == "mmap" or (self.config.residency == "auto" and large)

    def cache(self) -> Cache:
        """The cache; its name is a digest of the files and of the settings that change the decoded images."""
        train, test = len(self.listing.train.files), len(self.listing.test.files)
        text = f"{DECODING} {self.listing.digest} {self.config.image_size} {self.config.on_bad} {train}"
        return Cache(cache_folder(self.config.cache), hashlib.sha256(text.encode()).hexdigest()[:32], (train, test),
                     self.shape)

    def chunks(self, files: Sequence[str], allowed: int | None = None, *, tell: bool = False,
               stop: StopFlag | None = None) -> Iterator[Chunk]:
        """Decode in order, at most 1024 images or 64 MiB (but 16 images) at a time, in threads.

        Args:
            files: names below the root.
            allowed: how many of them may be left out; default a few with data.on_bad=skip, else none.
            tell: print lines of progress.
            stop: looked at between two images.

        Raises DataError for an unreadable file, too many of them, or images of several sizes.
        """
        if allowed is None:
            few = min(SKIP_FEW, math.ceil(len(files) * SKIP_FEW_SHARE))
            allowed = max(int(len(files) * SKIP_SHARE), few) if self.config.on_bad == "skip" else 0
        bad, voice = 0, Voice(tell)
        length = min(_CHUNK_FILES, max(_BLOCK, _CHUNK_BYTES // math.prod(self.shape)))
        with ThreadPool(len(os.sched_getaffinity(0))) as pool:
            for first in range(0, len(files), length):
                names = files[first : first + length]
                decoded = pool.map(partial(self._read, stop=stop), names, chunksize=_BLOCK)
                failed = {name: found for name, (found, _) in zip(names, decoded, strict=True)
                          if isinstance(found, str)}
                bad += len(failed)
                if bad > allowed:
                    self._refuse(*next(iter(failed.items())), bad, allowed, len(files))
                images = [found.transpose(2, 0, 1) for found, _ in decoded if not isinstance(found, str)]
                yield Chunk(np.stack(images) if images else np.empty((0, *self.shape), np.uint8), list(failed),
                            Counter(kind for _, kinds in decoded for kind in kinds))
                voice.tell(f"decoded {first + len(names)} of {len(files)} images of {self.listing.root}")

    def sample(self, count: int) -> ImageSet:
        """About `count` training images, evenly spread. Raises as decoding all of them does."""
        split = self.listing.train
        rows = np.linspace(0, len(split.files) - 1, min(count, len(split.files))).astype(np.int64)
        names = [split.files[row] for row in rows]
        images, skipped, _ = _in_memory(self.chunks(names, len(names) - 1 if self.config.on_bad == "skip" else 0),
                                        (len(names), *self.shape))
        labels = split.labels[[row for row, name in zip(rows, names, strict=True) if name not in skipped]]
        return ImageSet(torch.from_numpy(images), torch.from_numpy(labels))

    def look(self, _: DataConfig | None = None) -> RawData:
        """What is in the folder, of whose images a few are decoded; the pixels are 0 and fill no memory. Raises as
        loading does, for what it looks at."""
        self.sample(LOOKED_AT)
        if self.maps and (cache := self.cache()).look()[0] is None:
            cache.check_space()
        train, test = (np.broadcast_to(np.uint8(0), (len(split.files), *self.shape))
                       for split in (self.listing.train, self.listing.test))
        return _raw(self.listing, train, test, (), {})

    def _read(self, name: str, stop: StopFlag | None) -> tuple[np.ndarray | str, list[str]]:
        """As `_attempt`. Another size than that of the first image is a DataError."""
        leave_if(stop, "decoding images", str(self.listing.root))
        path = self.listing.root / name
        image, told = _attempt(path, self.config.image_size)
        if not isinstance(image, str) and image.shape[:2] != self.shape[1:]:
            found, first = (f"{size[1]} x {size[0]}" for size in (image.shape, self.shape[1:]))
            raise DataError(f"images of several sizes: this one is {found}, the first {first}", str(path),
                            "set data.image_size to resize all images")
        return image, told

    def _refuse(self, name: str, reason: str, bad: int, allowed: int, total: int) -> None:
        path = str(self.listing.root / name)
        if self.config.on_bad == "stop":
            raise DataError(f"cannot read the image ({reason})", path, "repair or remove it, or set data.on_bad=skip")
        raise DataError(f"{bad} or more of {total} images cannot be read, at most {allowed} may be skipped; one "
                        f"reason: {reason}", path, "repair or remove them")


def _attempt(path: Path, side: int | None) -> tuple[np.ndarray | str, list[str]]:
    """The image (H, W, 3), or why it cannot be read; and what was converted."""
    told: list[str] = []
    try:
        return read_image(path, side, told.append), told
    except MatError:  # a second signal
        raise
    except Exception as problem:  # decoders raise many kinds for damage; a lack of memory is named like it
        return f"{type(problem).__name__}: {problem}", told


# ---------------------------------------------------------------- loading


@register_dataset("folder", shared=True, stoppable=True)
def load_folder(config: DataConfig, build: bool, stop: StopFlag | None = None) -> RawData:
    """The images of `data.root`: decoded into memory, or mapped from a cache that one process builds. Raises DataError
    for layout, unreadable images, or images of several sizes without `data.image_size`; OutputError for the cache."""
    decoder = Decoder.open(config, stop, tell=build)
    listing = decoder.listing
    parts = [decoder.chunks(split.files, tell=build, stop=stop) for split in (listing.train, listing.test)]
    if decoder.maps:
        return _from_cache(decoder, parts, build, stop)
    check_memory(listing.count * math.prod(decoder.shape), f"data.root={listing.root}", "set data.residency=mmap")
    (train, train_skipped, told), (test, test_skipped, more) = (
        _in_memory(chunks, (len(split.files), *decoder.shape))
        for chunks, split in zip(parts, (listing.train, listing.test), strict=True))
    return _raw(listing, train, test, (train_skipped, test_skipped), told + more)


def _in_memory(chunks: Iterator[Chunk], shape: tuple[int, ...]) -> tuple[np.ndarray, list[str], Counter[str]]:
    """The images of a split, held once, the files that were left out, and what was converted."""
    images, place, skipped, told = np.empty(shape, np.uint8), 0, list[str](), Counter[str]()
    for chunk in chunks:
        images[place : place + len(chunk.images)] = chunk.images
        place += len(chunk.images)
        skipped += chunk.skipped
        told += chunk.told
    return images[:place], skipped, told


def _raw(listing: Listing, train: Any, test: Any, skipped: Sequence[Sequence[str]], told: Mapping[str, int],
         more: Sequence[str] = (), **other: Any) -> RawData:
    """Images with the labels of those that were not left out, and the notes."""
    gone = dict.fromkeys(name for names in skipped for name in names)
    train_labels, test_labels = (split.labels[[name not in gone for name in split.files]] if gone else split.labels
                                 for split in (listing.train, listing.test))
    notes = [f"{len(gone)} unreadable images were left out: {', '.join(gone)}"] if gone else []
    if told:
        notes.append("images that were converted: "
                     + "; ".join(f"{count} x {kind}" for kind, count in sorted(told.items())))
    return RawData(train, train_labels, test, test_labels, listing.classes,
                   (*listing.notes, *notes, *more), **other)


def _from_cache(decoder: Decoder, parts: Sequence[Iterator[Chunk]], build: bool, stop: StopFlag | None) -> RawData:
    cache, notes = decoder.cache(), list[str]()

    def ready() -> Manifest | None:
        manifest, problem = cache.look()
        note = f"the cache {cache.image_file} is rebuilt: {problem}"
        if problem and note not in notes:
            notes.append(note)
        return manifest

    def make() -> None:
        cache.build(*parts)
        notes.append(f"decoded {cache.nbytes / 2**20:.0f} MiB of images into the cache {cache.image_file}")

    manifest = once(ready, make, cache.lock_file, build=build, what="the cache of decoded images", stop=stop)
    file = MappedFile.of(cache.image_file)
    return _raw(decoder.listing, *cache.open(manifest), manifest.skipped, manifest.told, notes,
                image_sha256=manifest.image_sha256, mapped=True, file=file)
