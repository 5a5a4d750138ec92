"""`folder`: images on disk as train/CLASS/* and test/CLASS/*."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mat_dist.config.schema import DataConfig
from mat_dist.data.cache import Cache, Chunk, Manifest, cache_folder
from mat_dist.data.decode import decode_all, image_shape
from mat_dist.data.images import RawData
from mat_dist.data.memory import check_memory
from mat_dist.data.once import MakerLock, once
from mat_dist.data.registry import register_dataset
from mat_dist.errors import DataError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
# Above either, residency auto maps a cache: every rank would fill its own memory, and decode all files at each start
# (60 000 JPEGs of 32x32 take 12 s of one core, the cache of them opens in under a second).
MMAP_BYTES = 2 << 30
MMAP_FILES = 10_000
SKIP_SHARE = 0.001  # of the files of a split may be unreadable with on_bad=skip
_LAYOUT = "expected train/CLASS/*.jpg and test/CLASS/*.jpg below data.root"


@dataclass(frozen=True)
class Split:
    """The image files of one split, sorted by class and path, as paths below the root; labels int64 (N,)."""

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


def list_images(root: Path) -> Listing:
    """The classes and files below `root`; opens no image.

    Raises:
        DataError: the folder is missing, not readable or not laid out as expected, or a class has no image.
    """
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
    train, test = (_list_split(root, split, classes, digest, notes) for split in ("train", held_out))
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
                notes: list[str]) -> Split:
    files: list[str] = []
    labels: list[int] = []
    others = 0
    for label, name in enumerate(classes):
        for path in _walk(root / split / name):
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


@register_dataset("folder", shared=True)
def load_folder(config: DataConfig, build: bool) -> RawData:
    """The images of `data.root`: decoded into memory, or mapped from a cache that one process builds.

    Raises:
        DataError: layout, unreadable images, images of several sizes without `data.image_size`.
        OutputError: the cache cannot be written.
    """
    if config.root is None:
        raise DataError("data.root is not set", "data.name=folder", _LAYOUT)
    listing = list_images(Path(os.path.expanduser(config.root)))
    shape = image_shape(listing.root, listing.train.files, config.image_size, skip_bad=config.on_bad == "skip")
    nbytes = (len(listing.train.files) + len(listing.test.files)) * int(np.prod(shape))
    large = nbytes > MMAP_BYTES or len(listing.train.files) + len(listing.test.files) > MMAP_FILES
    if config.residency == "mmap" or (config.residency == "auto" and large):
        return _from_cache(config, listing, shape, nbytes, build)
    check_memory(nbytes, f"data.root={listing.root}", "set data.residency=mmap")
    return _from_memory(config, listing, shape)


def _chunks(config: DataConfig, listing: Listing, split: Split, shape: tuple[int, int, int]) -> Iterator[Chunk]:
    """The decoded images of one split, in order."""
    allowed = int(len(split.files) * SKIP_SHARE) if config.on_bad == "skip" else 0
    return decode_all(listing.root, split.files, shape, resize=config.image_size is not None,
                      on_bad=config.on_bad, allowed=allowed)


def _kept_labels(split: Split, skipped: tuple[str, ...]) -> np.ndarray:
    """Labels without those of the skipped files."""
    if not skipped:
        return split.labels
    gone = set(skipped)
    return split.labels[[name not in gone for name in split.files]]


def _skip_notes(skipped: tuple[str, ...]) -> tuple[str, ...]:
    return (f"{len(skipped)} unreadable images were left out: {', '.join(skipped)}",) if skipped else ()


def _from_memory(config: DataConfig, listing: Listing, shape: tuple[int, int, int]) -> RawData:
    parts: list[np.ndarray] = []
    skipped: list[tuple[str, ...]] = []
    for split in (listing.train, listing.test):
        images, place = np.empty((len(split.files), *shape), np.uint8), 0
        bad: list[str] = []
        for chunk in _chunks(config, listing, split, shape):
            images[place : place + len(chunk.images)] = chunk.images
            place += len(chunk.images)
            bad.extend(chunk.skipped)
        parts.append(images[:place])
        skipped.append(tuple(bad))
    return RawData(parts[0], _kept_labels(listing.train, skipped[0]), parts[1], _kept_labels(listing.test, skipped[1]),
                   listing.classes, (*listing.notes, *_skip_notes(skipped[0] + skipped[1])))


def cache_key(listing: Listing, config: DataConfig) -> str:
    """The name of the cache: a digest of the files and of the settings that change the decoded images."""
    text = f"{listing.digest} {config.image_size} {config.on_bad} {len(listing.train.files)}"
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _from_cache(config: DataConfig, listing: Listing, shape: tuple[int, int, int], nbytes: int, build: bool) -> RawData:
    cache = Cache(cache_folder(config.cache), cache_key(listing, config))
    notes: list[str] = []

    def ready() -> Manifest | None:
        manifest, problem = cache.look()
        note = f"the cache {cache.image_file} is rebuilt: {problem}"
        if problem and note not in notes:
            notes.append(note)
        return manifest

    def make(lock: MakerLock) -> None:
        train, test = (_chunks(config, listing, split, shape) for split in (listing.train, listing.test))
        cache.build(train, test, shape=shape, nbytes=nbytes, lock=lock)
        notes.append(f"decoded {nbytes / 2**20:.0f} MiB of images into the cache {cache.image_file}")

    manifest = once(ready, make, cache.lock_file, build=build, what="the cache of decoded images")
    train, test = cache.open(manifest)
    skipped = manifest.skipped
    return RawData(train, _kept_labels(listing.train, skipped[0]), test, _kept_labels(listing.test, skipped[1]),
                   listing.classes, (*listing.notes, *_skip_notes(skipped[0] + skipped[1]), *notes),
                   manifest.image_sha256, mapped=True)
