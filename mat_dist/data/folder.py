"""`folder`: images on disk as train/CLASS/* and test/CLASS/*: listing, decoding, loading."""

from __future__ import annotations

import hashlib
import math
import os
import struct
import sys
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from mat_dist.config.schema import DataConfig
from mat_dist.data.cache import Cache, Chunk, Manifest, cache_folder
from mat_dist.data.images import ImageSet, MappedFile, RawData, check_memory, register_dataset, root_of
from mat_dist.data.shared import once
from mat_dist.distributed.stopping import StopFlag, leave_if
from mat_dist.errors import DataError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
FORMATS = ("JPEG", "PNG", "BMP", "WEBP")
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")
MOST_PIXELS = 89_478_485  # Pillow warns above this and goes on; we refuse
# What Pillow's decoders raise on damaged files.
DAMAGE = (OSError, SyntaxError, ValueError, TypeError, ArithmeticError, LookupError, EOFError, struct.error,
          zlib.error, Image.DecompressionBombError)
# Above either, residency auto maps a cache: every rank would fill its own memory, and decode all files at each start
# (60 000 JPEGs of 32x32 take 12 s of one core, the cache of them opens in under a second).
MMAP_BYTES = 2 << 30
MMAP_FILES = 10_000
SKIP_SHARE = 0.001  # of the files of a split may be unreadable with on_bad=skip
_CHUNK_BYTES, _CHUNK_FILES = 64 << 20, 1024  # decoded at a time
_BLOCK = 16  # files that a thread takes at once
_TELL = 30.0  # seconds between two lines of progress
_LAYOUT = "expected train/CLASS/*.jpg and test/CLASS/*.jpg below data.root"


@dataclass(frozen=True)
class Split:
    """The image files of a split, sorted by class and path, as paths below the root; labels int64 (N,)."""

    files: tuple[str, ...]
    labels: np.ndarray


@dataclass(frozen=True)
class Listing:
    """What is in the folder. `digest` covers paths, sizes and modification times of all files."""

    root: Path
    classes: tuple[str, ...]
    train: Split
    test: Split
    digest: str
    notes: tuple[str, ...]

    @property
    def count(self) -> int:
        """Image files of both splits."""
        return len(self.train.files) + len(self.test.files)


def list_images(root: Path, stop: StopFlag | None = None) -> Listing:
    """The classes and files below `root`; opens no image. Raises DataError where the folder is missing, not readable or
    not laid out as expected, or a class has no image."""
    if not root.is_dir():
        found = "is a file" if root.exists() else "does not exist"
        raise DataError(f"the folder {found}", f"data.root={root}", _LAYOUT)
    names = _subfolders(root)
    notes: list[str] = []
    if "train" not in names:
        raise DataError(f"no folder train, found {', '.join(names[:5]) or 'nothing'}", f"data.root={root}", _LAYOUT)
    held_out = next((name for name in ("test", "val", "valid") if name in names), None)
    if held_out is None:
        raise DataError("no folder test (nor val or valid)", f"data.root={root}", _LAYOUT)
    if held_out != "test":
        notes.append(f"test images come from {held_out}/, there is no test/; validation images are taken from train/")
    classes = _subfolders(root / "train")
    if len(classes) < 2:
        raise DataError(f"{len(classes)} class folders", str(root / "train"), f"two or more are needed; {_LAYOUT}")
    unknown = sorted(set(_subfolders(root / held_out)) - set(classes))
    if unknown:
        raise DataError(f"class {unknown[0]!r} is not in train/ ({len(unknown)} such classes)", str(root / held_out),
                        "test classes must be among the training classes")
    digest = hashlib.sha256()
    train, test = (_list_split(root, split, classes, digest, notes, stop) for split in ("train", held_out))
    missing = set(range(len(classes))) - set(train.labels.tolist())
    if missing:
        raise DataError(f"class {classes[min(missing)]!r} has no image", str(root / "train"),
                        f"give it images ({', '.join(EXTENSIONS)}) or remove its folder")
    if not test.files:
        raise DataError("no test image", str(root / held_out), _LAYOUT)
    return Listing(root, classes, train, test, digest.hexdigest(), tuple(notes))


def _subfolders(folder: Path) -> tuple[str, ...]:
    """Names of the folders in `folder`, sorted, without hidden ones."""
    try:
        with os.scandir(folder) as entries:
            return tuple(sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")))
    except OSError as problem:
        raise DataError(f"cannot list the folder: {problem.strerror}", str(folder), "make it readable") from problem


def _list_split(root: Path, split: str, classes: tuple[str, ...], digest: hashlib._Hash,
                notes: list[str], stop: StopFlag | None) -> Split:
    files: list[str] = []
    labels: list[int] = []
    others = 0
    for label, name in enumerate(classes):
        for path in _walk(root / split / name):
            leave_if(stop, "listing images", str(root))  # a network disk answers for some 1000 files a second
            if not path.lower().endswith(EXTENSIONS):
                others += 1
                continue
            relative = os.path.relpath(path, root)
            try:
                status = os.stat(path)
                state = f"{status.st_size} {status.st_mtime_ns}"
            except OSError:  # a broken link: reading it will be refused or skipped like any bad file
                state = "unreadable"
            digest.update(f"{relative}\0{state}\0".encode("utf-8", "surrogateescape"))
            files.append(relative)
            labels.append(label)
    if others:
        notes.append(f"{others} files in {split}/ are no images ({', '.join(EXTENSIONS)}) and were ignored")
    return Split(tuple(files), np.array(labels, np.int64))


def _walk(folder: Path) -> Iterator[str]:
    """All files below `folder`, sorted, without hidden ones."""

    def refuse(problem: OSError) -> None:
        if not isinstance(problem, FileNotFoundError):  # a test split may lack a class
            raise DataError(f"cannot list the folder: {problem.strerror}", str(problem.filename), "make it readable")

    for where, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (os.path.join(where, name) for name in sorted(files) if not name.startswith("."))


# ---------------------------------------------------------------- decoding


def read_image(path: Path, side: int | None) -> np.ndarray:
    """One image as uint8 (H, W, 3); with `side`, its shorter side is resized to it and the centre square cut out.

    Bilinear with antialiasing, as torchvision's Resize and CenterCrop, whose import takes as long as 5000 small images.
    An image of the right size is left untouched. Raises what Pillow raises, and ValueError for more than 89 million
    pixels, before they are allocated.
    """
    with Image.open(path, formats=FORMATS) as image:
        short, long = sorted(image.size)
        resized = side * side * long // short if side is not None and short else 0
        if max(short * long, resized) > MOST_PIXELS:
            raise ValueError(f"{image.size[0]} x {image.size[1]} pixels, at most {MOST_PIXELS} are decoded")
        if image.mode not in MODES:  # Pillow would cut 16-bit values off at 255 and say nothing
            raise ValueError(f"pixels of type {image.mode}, 8 bits per channel are needed")
        rgb = image.convert("RGB")
    if side is not None and rgb.size != (side, side):
        rgb = rgb.resize([max(side, length * side // short) for length in rgb.size], Image.Resampling.BILINEAR)
        left, top = (round((length - side) / 2) for length in rgb.size)
        rgb = rgb.crop((left, top, left + side, top + side))
    return np.asarray(rgb)


@dataclass(frozen=True)
class Decoder:
    """How the files of a folder become arrays, all of them of `shape` (3, H, W)."""

    listing: Listing
    config: DataConfig
    shape: tuple[int, int, int]

    @classmethod
    def of(cls, listing: Listing, config: DataConfig) -> Decoder:
        """The shape is `data.image_size`, or that of the first image that can be read. Raises DataError."""
        side, reason = config.image_size, ""
        if side is not None:
            return cls(listing, config, (3, side, side))
        for name in listing.train.files[: 100 if config.on_bad == "skip" else 1]:
            try:
                height, width, channels = read_image(listing.root / name, None).shape
            except DAMAGE as problem:
                reason = f"{type(problem).__name__}: {problem}"
            else:
                return cls(listing, config, (channels, height, width))
        raise DataError(f"cannot read the image ({reason})", str(listing.root / name), "repair or remove it")

    @property
    def maps(self) -> bool:
        """Whether the images are mapped from a cache: asked for, or many of them and residency auto."""
        large = self.listing.count * math.prod(self.shape) > MMAP_BYTES or self.listing.count > MMAP_FILES
        return self.config.residency == "mmap" or (self.config.residency == "auto" and large)

    def cache(self) -> Cache:
        """The cache; its name is a digest of the files and of the settings that change the decoded images."""
        train, test = len(self.listing.train.files), len(self.listing.test.files)
        text = f"{self.listing.digest} {self.config.image_size} {self.config.on_bad} {train}"
        return Cache(cache_folder(self.config.cache), hashlib.sha256(text.encode()).hexdigest()[:32], (train, test),
                     self.shape)

    def chunks(self, files: Sequence[str], allowed: int | None = None, *, tell: bool = False,
               stop: StopFlag | None = None) -> Iterator[Chunk]:
        """Decode in order, at most 1024 images or 64 MiB (but 16 images) at a time, in threads.

        Args:
            files: names below the root.
            allowed: how many of them may be left out; default one in a thousand with data.on_bad=skip, else none.
            tell: print a line every half minute.
            stop: looked at between two images.

        Raises DataError for an unreadable file, too many of them, or images of several sizes.
        """
        if allowed is None:
            allowed = int(len(files) * SKIP_SHARE) if self.config.on_bad == "skip" else 0
        bad, told = 0, time.monotonic()
        length = min(_CHUNK_FILES, max(_BLOCK, _CHUNK_BYTES // math.prod(self.shape)))
        with ThreadPool(len(os.sched_getaffinity(0))) as pool:
            for first in range(0, len(files), length):
                names = files[first : first + length]
                decoded = pool.map(partial(self._read, stop=stop), names, chunksize=_BLOCK)
                failed = {name: found for name, found in zip(names, decoded, strict=True) if isinstance(found, str)}
                bad += len(failed)
                if bad > allowed:
                    self._refuse(*next(iter(failed.items())), bad, allowed, len(files))
                images = [found.transpose(2, 0, 1) for found in decoded if not isinstance(found, str)]
                yield Chunk(np.stack(images) if images else np.empty((0, *self.shape), np.uint8), list(failed))
                if tell and time.monotonic() - told > _TELL:
                    told = time.monotonic()
                    print(f"mat_dist: decoded {first + len(names)} of {len(files)} images of {self.listing.root}",
                          file=sys.stderr, flush=True)

    def _read(self, name: str, stop: StopFlag | None) -> np.ndarray | str:
        """The image (H, W, 3), or why it cannot be read. Another size than that of the first is a DataError."""
        leave_if(stop, "decoding images", str(self.listing.root))
        path = self.listing.root / name
        try:
            image = read_image(path, self.config.image_size)
        except DAMAGE as problem:
            return f"{type(problem).__name__}: {problem}"
        if image.shape[:2] != self.shape[1:]:
            found, first = (f"{size[1]} x {size[0]}" for size in (image.shape, self.shape[1:]))
            raise DataError(f"images of several sizes: this one is {found}, the first {first}", str(path),
                            "set data.image_size to resize all images")
        return image

    def _refuse(self, name: str, reason: str, bad: int, allowed: int, total: int) -> None:
        path = str(self.listing.root / name)
        if self.config.on_bad == "stop":
            raise DataError(f"cannot read the image ({reason})", path, "repair or remove it, or set data.on_bad=skip")
        raise DataError(f"{bad} or more of {total} images cannot be read, at most {allowed} (0.1 %) may be skipped; "
                        f"one reason: {reason}", path, "repair or remove them")


# ---------------------------------------------------------------- loading


@register_dataset("folder", shared=True, stoppable=True)
def load_folder(config: DataConfig, build: bool, stop: StopFlag | None = None) -> RawData:
    """The images of `data.root`: decoded into memory, or mapped from a cache that one process builds. Raises DataError
    for layout, unreadable images, or images of several sizes without `data.image_size`; OutputError for the cache."""
    listing = list_images(root_of(config, _LAYOUT), stop)
    decoder = Decoder.of(listing, config)
    parts = [decoder.chunks(split.files, tell=build, stop=stop) for split in (listing.train, listing.test)]
    if decoder.maps:
        return _from_cache(decoder, parts, build, stop)
    check_memory(listing.count * math.prod(decoder.shape), f"data.root={listing.root}", "set data.residency=mmap")
    (train, train_skipped), (test, test_skipped) = (
        _in_memory(chunks, (len(split.files), *decoder.shape))
        for chunks, split in zip(parts, (listing.train, listing.test), strict=True))
    return _raw(listing, train, test, (train_skipped, test_skipped))


def _in_memory(chunks: Iterator[Chunk], shape: tuple[int, ...]) -> tuple[np.ndarray, list[str]]:
    """The images of a split, held once, and the files that were left out."""
    images, place, skipped = np.empty(shape, np.uint8), 0, list[str]()
    for chunk in chunks:
        images[place : place + len(chunk.images)] = chunk.images
        place += len(chunk.images)
        skipped += chunk.skipped
    return images[:place], skipped


def _raw(listing: Listing, train: Any, test: Any, skipped: Sequence[Sequence[str]], **other: Any) -> RawData:
    """Images with the labels of those that were not left out, and the notes."""
    gone = dict.fromkeys(name for names in skipped for name in names)
    train_labels, test_labels = (split.labels[[name not in gone for name in split.files]] if gone else split.labels
                                 for split in (listing.train, listing.test))
    notes = (f"{len(gone)} unreadable images were left out: {', '.join(gone)}",)
    return RawData(train, train_labels, test, test_labels, listing.classes,
                   (*listing.notes, *(notes if gone else ()), *other.pop("notes", ())), **other)


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
    return _raw(decoder.listing, *cache.open(manifest), manifest.skipped, notes=notes,
                image_sha256=manifest.image_sha256, mapped=True, file=file)


def preview_folder(config: DataConfig, count: int) -> tuple[ImageSet, Listing, Cache] | None:
    """About `count` training images, evenly spread, without building a cache; None where a run would read all images
    at once or open its cache. Raises as loading does, for the images that are looked at, and OutputError where the
    cache cannot be built in its folder."""
    if config.root is None or not os.path.isdir(os.path.expanduser(config.root)):
        return None  # loading says what is wrong
    listing = list_images(Path(os.path.expanduser(config.root)))
    decoder = Decoder.of(listing, config)
    cache = decoder.cache() if decoder.maps else None
    if cache is None or cache.look()[0] is not None:
        return None
    cache.check_space()
    total = len(listing.train.files)
    rows = np.linspace(0, total - 1, min(count, total)).astype(np.int64)
    names = [listing.train.files[row] for row in rows]
    images, skipped = _in_memory(decoder.chunks(names, len(names) - 1 if config.on_bad == "skip" else 0),
                                 (len(names), *decoder.shape))
    labels = listing.train.labels[[row for row, name in zip(rows, names, strict=True) if name not in skipped]]
    return ImageSet(torch.from_numpy(images), torch.from_numpy(labels)), listing, cache
