"""`folder`: images on disk as train/CLASS/* and test/CLASS/*."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mat_dist.config.schema import DataConfig
from mat_dist.data.cache import Cache, Chunk, Manifest, cache_folder
from mat_dist.data.decode import decode_all, image_shape
from mat_dist.data.images import MappedFile, RawData
from mat_dist.data.memory import check_memory
from mat_dist.data.once import MakerLock, once
from mat_dist.data.registry import register_dataset
from mat_dist.distributed.stopping import StopFlag, leave_if
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

    @property
    def count(self) -> int:
        """Image files of both splits."""
        return len(self.train.files) + len(self.test.files)


def list_images(root: Path, stop: StopFlag | None = None) -> Listing:
    """The classes and files below `root`; opens no image.

    Raises:
        DataError: the folder is missing, not readable or not laid out as expected, or a class has no image.
        StopRequested: this process was asked to stop.
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


@register_dataset("folder", shared=True, stoppable=True)
def load_folder(config: DataConfig, build: bool, stop: StopFlag | None = None) -> RawData:
    """The images of `data.root`: decoded into memory, or mapped from a cache that one process builds.

    Raises:
        DataError: layout, unreadable images, images of several sizes without `data.image_size`.
        OutputError: the cache cannot be written.
        StopRequested: this process was asked to stop; a half-built cache is continued the next time.
    """
    if config.root is None:
        raise DataError("data.root is not set", "data.name=folder", _LAYOUT)
    listing = list_images(Path(os.path.expanduser(config.root)), stop)
    shape = image_shape(listing.root, listing.train.files, config.image_size, skip_bad=config.on_bad == "skip")
    if maps(config, listing, shape):
        return _from_cache(config, listing, shape, build, stop)
    check_memory(listing.count * int(np.prod(shape)), f"data.root={listing.root}", "set data.residency=mmap")
    return _from_memory(config, listing, shape, stop)


def maps(config: DataConfig, listing: Listing, shape: tuple[int, int, int]) -> bool:
    """Whether the images are mapped from a cache: asked for, or many of them and residency auto."""
    large = listing.count * int(np.prod(shape)) > MMAP_BYTES or listing.count > MMAP_FILES
    return config.residency == "mmap" or (config.residency == "auto" and large)


def _chunks(config: DataConfig, listing: Listing, split: Split, shape: tuple[int, int, int],
            stop: StopFlag | None) -> Callable[[int, int], Iterator[Chunk]]:
    """A function (first file, files left out before it) -> the decoded images of one split from there on, in order."""
    allowed = int(len(split.files) * SKIP_SHARE) if config.on_bad == "skip" else 0

    def decoded(begin: int, bad: int) -> Iterator[Chunk]:
        return decode_all(listing.root, split.files, shape, resize=config.image_size is not None,
                          on_bad=config.on_bad, allowed=allowed, begin=begin, bad=bad, stop=stop)

    return decoded


def _kept_labels(split: Split, skipped: tuple[str, ...]) -> np.ndarray:
    """Labels without those of the skipped files."""
    if not skipped:
        return split.labels
    gone = set(skipped)
    return split.labels[[name not in gone for name in split.files]]


def _skip_notes(skipped: tuple[str, ...]) -> tuple[str, ...]:
    return (f"{len(skipped)} unreadable images were left out: {', '.join(skipped)}",) if skipped else ()


def _from_memory(config: DataConfig, listing: Listing, shape: tuple[int, int, int], stop: StopFlag | None) -> RawData:
    parts: list[np.ndarray] = []
    skipped: list[tuple[str, ...]] = []
    for split in (listing.train, listing.test):
        images, place = np.empty((len(split.files), *shape), np.uint8), 0
        bad: list[str] = []
        for chunk in _chunks(config, listing, split, shape, stop)(0, 0):
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


def _from_cache(config: DataConfig, listing: Listing, shape: tuple[int, int, int], build: bool,
                stop: StopFlag | None) -> RawData:
    cache = Cache(cache_folder(config.cache), cache_key(listing, config))
    nbytes = listing.count * int(np.prod(shape))
    notes: list[str] = []

    def ready() -> Manifest | None:
        manifest, problem = cache.look()
        note = f"the cache {cache.image_file} is rebuilt: {problem}"
        if problem and note not in notes:
            notes.append(note)
        return manifest

    def make(lock: MakerLock) -> None:
        train, test = (_chunks(config, listing, split, shape, stop) for split in (listing.train, listing.test))
        done = cache.build(train, test, shape=shape, nbytes=nbytes, lock=lock, stop=stop)
        if done:
            notes.append(f"{done} images of the cache were there from a start that was stopped")
        notes.append(f"decoded {nbytes / 2**20:.0f} MiB of images into the cache {cache.image_file}")

    manifest = once(ready, make, cache.lock_file, build=build, what="the cache of decoded images", stop=stop)
    file = MappedFile.of(cache.image_file)
    train, test = cache.open(manifest)
    skipped = manifest.skipped
    return RawData(train, _kept_labels(listing.train, skipped[0]), test, _kept_labels(listing.test, skipped[1]),
                   listing.classes, (*listing.notes, *_skip_notes(skipped[0] + skipped[1]), *notes),
                   manifest.image_sha256, mapped=True, file=file)
