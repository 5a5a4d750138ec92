"""Image sets: what a data set is once it is read, and how a batch is taken from it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mat_dist.errors import DataError


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
    """What a data-set function returns. Images are (N, C, H, W): uint8, or float in [0, 1].

    Labels are whole numbers 0..K-1, with K = len(classes). Arrays are numpy arrays or tensors on the CPU. `notes`
    are lines for the log. `image_sha256` are the digests of the train and test image bytes where they are known
    without reading all images; `mapped` says that the images are a file mapped into memory, `file` which one.
    """

    train_images: Any
    train_labels: Any
    test_images: Any
    test_labels: Any
    classes: tuple[str, ...]
    notes: tuple[str, ...] = ()
    image_sha256: tuple[str, str] | None = None
    mapped: bool = False
    file: MappedFile | None = None


@dataclass(frozen=True, eq=False)
class ImageSet:
    """N labelled images, kept as they are stored; subsets share the storage.

    Args:
        store: uint8 images (M, C, H, W), or float32 in [0, 1]; in device memory, host memory or a mapped file.
        labels: int64 (N,), on the same device.
        rows: int64 (N,), the row of `store` of each image; empty where the set is the whole store.
        mapped: the store is a mapped file, so reading all of it is expensive.
        file: that file, looked at before each batch.
    """

    store: Tensor
    labels: Tensor
    rows: Tensor | None = None
    mapped: bool = False
    file: MappedFile | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        channels, height, width = self.store.shape[1:]
        return channels, height, width

    @property
    def device(self) -> torch.device:
        """Where the images lie."""
        return self.store.device

    @property
    def nbytes(self) -> int:
        """Bytes of the N images."""
        return len(self) * self.store[:1].numel() * self.store.element_size()

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
        """Images as stored (B, C, H, W) and labels (B,) at `indices`; reads no other image.

        Raises DataError if they are mapped from a file that was written to.
        """
        if self.file is not None:
            self.file.check()
        indices = indices.to(self.device)
        rows = indices if self.rows is None else self.rows[indices]
        return self.store.index_select(0, rows), self.labels[indices]


@dataclass(frozen=True, eq=False)
class DataSets:
    """The three splits of a data set.

    `digest` is the SHA-256 of the whole data set before splitting (name, classes, shapes, labels, image bytes), the
    same for every residency and rank; generated and poisoned images, where there are any, change it. `notes` are lines
    for the log. `generated` are images to mix into the training batches; they stay in their file.
    """

    train: ImageSet
    val: ImageSet
    test: ImageSet
    classes: tuple[str, ...]
    digest: str
    notes: tuple[str, ...]
    generated: ImageSet | None = None


def as_float(images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Stored images as numbers in [0, 1]: uint8 / 255, float32 as it is; the same bits on every device."""
    return by_255(images.to(dtype)) if images.dtype == torch.uint8 else images.to(dtype)


def by_255(values: Tensor) -> Tensor:
    """Divided in place and correctly rounded; CUDA multiplies by 1/255 where the divisor is a Python number."""
    return values.div_(torch.full((), 255.0, dtype=values.dtype, device=values.device))
