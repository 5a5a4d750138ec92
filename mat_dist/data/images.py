"""Data sets: their names, what their readers return, how a batch is taken, means, place in memory.

A plug-in file adds its own with `@register_dataset("name")`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mat_dist import rng
from mat_dist.config.schema import DataConfig
from mat_dist.distributed.stopping import StopFlag
from mat_dist.errors import ConfigError, DataError, nearest

MAPPED_IMAGES = 50_000  # of a mapped set are looked at for means: all of ImageNet would be read from disk
LEAST_STD = 1 / 255  # a constant channel must not divide by zero
_SUMMED = 512  # images per sum; 2**16 levels squared times 512 images of 1024 x 1024 pixels stay below 2**63
_FLOAT_LEVELS = 65535
_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")
# Settings, whether this process writes shared files, the stop request of this process -> images.
Loader = Callable[[DataConfig, bool, "StopFlag | None"], "RawData"]
_LOADERS: dict[str, Loader] = {}


@dataclass(frozen=True)
class MappedFile:
    """The file that mapped images lie in, as it was when it was opened."""

    path: Path
    inode: int
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, path: Path) -> MappedFile:
        """The file as it is now."""
        status = path.stat()
        return cls(path, status.st_ino, status.st_size, status.st_mtime_ns)

    def check(self) -> None:
        """Raise DataError if the file was written to since: reading beyond a new end would kill the process (SIGBUS).

        A file that was deleted or exchanged stays mapped as it was. Takes some microseconds.
        """
        try:
            status = os.stat(self.path)
        except OSError:
            return
        if status.st_ino == self.inode and (status.st_size, status.st_mtime_ns) != (self.size, self.mtime_ns):
            raise DataError(f"the file of images has changed under the run: {status.st_size} bytes instead of "
                            f"{self.size}, or other content", str(self.path),
                            "let nothing write there and start again: a cache is made anew, another file must be as "
                            "it was")


@dataclass(frozen=True)
class RawData:
    """What a data-set function returns: numpy arrays, or tensors on the CPU. Images are (N, C, H, W), uint8 or float in
    [0, 1]; labels are whole numbers 0..K-1, with K = len(classes)."""

    train_images: Any
    train_labels: Any
    test_images: Any
    test_labels: Any
    classes: tuple[str, ...]
    notes: tuple[str, ...] = ()  # lines for the log
    image_sha256: tuple[str, str] | None = None  # of train and test image bytes, where known without reading them all
    mapped: bool = False  # the images are a file mapped into memory,
    file: MappedFile | None = None  # this one


@dataclass(frozen=True, eq=False)
class ImageSet:
    """N labelled images, kept as they are stored; subsets share the storage."""

    store: Tensor  # uint8 (M, C, H, W), or float32 in [0, 1]; in device memory, host memory or a mapped file
    labels: Tensor  # int64 (N,), on the same device
    rows: Tensor | None = None  # int64 (N,), the row of `store` of each image; None: the set is the whole store
    mapped: bool = False  # the store is a mapped file, so reading all of it is expensive
    file: MappedFile | None = None  # that file, looked at before each batch

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        channels, height, width = self.store.shape[1:]
        return channels, height, width

    @property
    def device(self) -> torch.device:
        return self.store.device

    @property
    def nbytes(self) -> int:
        """Bytes of the N images."""
        return len(self) * self.store[:1].nbytes

    @property
    def images(self) -> Tensor:
        """All N images (N, C, H, W). Copies them where the set is a subset: for a mapped set take batches."""
        return self.store if self.rows is None else self.store.index_select(0, self.rows)

    def to(self, device: torch.device | str) -> ImageSet:
        """The set in the memory of `device`, itself if it is there; a subset moves without the rest of its store."""
        if self.device == torch.device(device):
            return self
        return ImageSet(self.images.to(device), self.labels.to(device))

    def select(self, indices: Tensor) -> ImageSet:
        """The subset at `indices` (int64), in that order; no image is copied."""
        indices = indices.to(self.device)
        rows = indices if self.rows is None else self.rows[indices]
        return ImageSet(self.store, self.labels[indices], rows, self.mapped, self.file)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Images as stored (B, C, H, W) and labels (B,) at `indices`; reads no other image. Raises DataError if they
        are mapped from a file that was written to."""
        if self.file is not None:
            self.file.check()
        indices = indices.to(self.device)
        rows = indices if self.rows is None else self.rows[indices]
        return self.store.index_select(0, rows), self.labels[indices]


@dataclass(frozen=True, eq=False)
class DataSets:
    """The three splits of a data set.

    `digest` is the SHA-256 of the whole data set before splitting (name, classes, shapes, labels, image bytes), the
    same for every residency and rank; generated images, where there are any, change it.
    """

    train: ImageSet
    val: ImageSet
    test: ImageSet
    classes: tuple[str, ...]
    digest: str
    notes: tuple[str, ...]  # lines for the log
    generated: ImageSet | None = None  # images to mix into the training batches; they stay in their file


def as_float(images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Stored images as numbers in [0, 1]: uint8 / 255, float32 as it is; the same bits on every device."""
    return by_255(images.to(dtype)) if images.dtype == torch.uint8 else images.to(dtype)


def by_255(values: Tensor) -> Tensor:
    """Divided in place and correctly rounded; CUDA multiplies by 1/255 where the divisor is a Python number."""
    return values.div_(torch.full((), 255.0, dtype=values.dtype, device=values.device))


def sampled_rows(train: ImageSet) -> int:
    """How many images `channel_stats` looks at."""
    return min(len(train), MAPPED_IMAGES) if train.mapped else len(train)


def channel_stats(train: ImageSet) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, std) per channel over all training images and pixels, in [0, 1] units; std is at least 1/255.

    From exact integer sums, so the numbers are the same on every rank, device and thread count. float32 images are
    rounded to 1/65535 for this. Of a mapped set with more than 50 000 images a keyed subset of that size is used,
    the same on every run.
    """
    levels = 255 if train.store.dtype == torch.uint8 else _FLOAT_LEVELS
    count = sampled_rows(train)
    rows = torch.arange(count)
    if count < len(train):
        rows = rng.permutation(rng.key(0, "channel-stats"), len(train))[:count].sort().values
    channels = train.shape[0]
    sums, squares = [0] * channels, [0] * channels
    for part in rows.split(_SUMMED):
        images = train.batch(part)[0]
        words = images.to(torch.int32) if levels == 255 else (images.double() * levels).round().to(torch.int64)
        sums = [*map(int.__add__, sums, words.sum((0, 2, 3), dtype=torch.int64).tolist())]
        squares = [*map(int.__add__, squares, words.square_().sum((0, 2, 3), dtype=torch.int64).tolist())]
    pixels = count * train.shape[1] * train.shape[2]
    means = [Fraction(total, pixels) for total in sums]
    variances = [Fraction(total, pixels) - mean**2 for total, mean in zip(squares, means, strict=True)]
    return (tuple(float(mean / levels) for mean in means),
            tuple(max(float(variance) ** 0.5 / levels, LEAST_STD) for variance in variances))


def available_bytes() -> int:
    """Memory that this process can still get, in bytes: the kernel's estimate, or less in a limited container."""
    amounts = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    with suppress(OSError, StopIteration):  # not Linux
        amounts.append(next(int(line.split()[1]) * 1024 for line in _MEMINFO.read_text().splitlines()
                            if line.startswith("MemAvailable:")))
    with suppress(OSError, ValueError, KeyError):  # no container limit that can be read
        limit, used, detail = ((_CGROUP / name).read_text() for name in ("memory.max", "memory.current", "memory.stat"))
        if limit.strip() != "max":
            file_pages = int(dict(line.split() for line in detail.splitlines())["file"])  # given back when needed
            amounts.append(int(limit) - int(used) + file_pages)
    return max(0, min(amounts))


def check_memory(nbytes: int, where: str, how: str) -> None:
    """Raises DataError where `nbytes` do not fit into the memory that is left."""
    free = available_bytes()
    if nbytes > free:
        raise DataError(f"the images need {nbytes / 2**30:.1f} GiB of memory, {free / 2**30:.1f} GiB are free", where,
                        how)


def register_dataset(name: str, *, shared: bool = False,
                     stoppable: bool = False) -> Callable[[Callable[..., RawData]], Callable[..., RawData]]:
    """Make a function (DataConfig) -> RawData available as `data.name=<name>`.

    Args:
        name: the name, which no other data set has.
        shared: the function takes a second argument `build` (bool) and writes files that ranks share (a download, a
            cache): a call with build=True may write them, a call with build=False waits until they are there.
        stoppable: the function also takes `stop` (a StopFlag or None) and calls `leave_if`
            (distributed.stopping) now and then; without it a stop request is noticed when the data are there.
    """

    def add(function: Callable[..., RawData]) -> Callable[..., RawData]:
        if name in _LOADERS:
            raise ConfigError(f"the data set {name!r} is registered twice",
                              f"{function.__module__}.{function.__name__}", "give it another name")

        def load(config: DataConfig, build: bool, stop: StopFlag | None = None) -> RawData:
            return function(config, *([build] if shared else []), **({"stop": stop} if stoppable else {}))

        _LOADERS[name] = load
        return function

    return add


def find_dataset(name: str) -> Loader:
    """The function (DataConfig, build, stop) -> RawData of a data set. Raises ConfigError for an unknown name."""
    if name in _LOADERS:
        return _LOADERS[name]
    near = nearest(name, _LOADERS)
    hint = f"did you mean {near}? " if near else ""
    raise ConfigError(f"unknown data set {name!r}", "data.name",
                      f"{hint}known: {', '.join(dataset_names())}; a plug-in file can register its own")


def root_of(config: DataConfig, how: str) -> Path:
    """`data.root`, `~` expanded. Raises DataError where it is not set."""
    if config.root is None:
        raise DataError("data.root is not set", f"data.name={config.name}", how)
    return Path(os.path.expanduser(config.root))


def dataset_names() -> tuple[str, ...]:
    """All registered names, sorted."""
    return tuple(sorted(_LOADERS))
