"""What every data set must satisfy before a model sees it; whatever does not is a DataError."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mat_dist.data.images import RawData
from mat_dist.errors import DataError

RANGE_TOLERANCE = 1e-4  # rounding of resizing libraries; 0 - 3e-8 was refused by others and annoyed users
LEVEL_TOLERANCE = 1e-6  # how near to a multiple of 1/255 a number must be to be stored as a byte
_CHUNK = 1024  # images looked at in one go, so that temporary copies stay small


def check_pixels(images: np.ndarray, where: str) -> np.ndarray:
    """uint8 as it is; float as float32 clamped to [0, 1].

    Raises:
        DataError: another type, NaN, or values below -1e-4 or above 1 + 1e-4.
    """
    if images.dtype == np.uint8:
        return images
    if images.dtype.kind != "f":
        raise DataError(f"images are {images.dtype}", where, "store uint8 (0 to 255), or float in [0, 1]")
    clamped = np.empty(images.shape, np.float32)
    for first in range(0, len(images), _CHUNK):
        chunk = images[first : first + _CHUNK].astype(np.float32)
        finite = np.isfinite(chunk)
        if not finite.all():
            bad = first + int(np.argwhere(~finite)[0][0])
            raise DataError(f"image {bad} has NaN or infinite pixels", where, "repair or remove it")
        low, high = float(chunk.min()), float(chunk.max())
        if low < -RANGE_TOLERANCE or high > 1 + RANGE_TOLERANCE:
            outside = (chunk < -RANGE_TOLERANCE) | (chunk > 1 + RANGE_TOLERANCE)
            bad = first + int(np.argwhere(outside)[0][0])
            raise DataError(f"images outside [0, 1]: found {low:.4g} to {high:.4g}, first in image {bad}", where,
                            "normalisation is a layer of the model, give images in [0, 1] (or uint8 in 0 to 255)")
        np.clip(chunk, 0, 1, out=clamped[first : first + _CHUNK])
    return clamped


def as_bytes(images: np.ndarray) -> np.ndarray | None:
    """float32 images in [0, 1] as uint8, or None unless every value is a multiple of 1/255 within 1e-6."""
    rounded = np.empty(images.shape, np.uint8)
    for first in range(0, len(images), _CHUNK):
        chunk = images[first : first + _CHUNK].astype(np.float64) * 255
        nearest = np.rint(chunk)
        if np.abs(chunk - nearest).max(initial=0) > 255 * LEVEL_TOLERANCE:
            return None
        rounded[first : first + _CHUNK] = nearest
    return rounded


def _check_images(images: Tensor | np.ndarray, where: str) -> np.ndarray:
    array = images.numpy() if isinstance(images, Tensor) else np.asarray(images)
    if array.ndim != 4:
        raise DataError(f"images have shape {array.shape}", where, "give (N, C, H, W)")
    if 0 in array.shape:
        raise DataError("there are no images", where, "at least one is needed")
    return check_pixels(array, where)


def _check_labels(labels: Tensor | np.ndarray, count: int, classes: tuple[str, ...], where: str) -> Tensor:
    array = labels.numpy() if isinstance(labels, Tensor) else np.asarray(labels)
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.dtype.kind not in "iu" or array.ndim != 1:
        raise DataError(f"labels are {array.dtype} of shape {array.shape}", where,
                        "give whole numbers 0..K-1, one per image")
    if len(array) != count:
        raise DataError(f"{count} images but {len(array)} labels", where, "give one label per image")
    outside = np.flatnonzero((array < 0) | (array >= len(classes)))
    if len(outside):
        bad = int(outside[0])
        raise DataError(f"label {int(array[bad])} of image {bad} is out of range", where,
                        f"labels count from 0 to {len(classes) - 1} for {len(classes)} classes")
    return torch.from_numpy(array.astype(np.int64))


def check_raw(raw: RawData, where: str) -> RawData:
    """The same data as uint8 or float32 tensors (N, C, H, W) and int64 labels, checked.

    Floats that are all multiples of 1/255 become uint8, in both splits or in none. Reads no pixel of uint8 images.

    Raises:
        DataError: see the messages; `where` names the data set in them.
    """
    classes = tuple(str(name) for name in raw.classes)
    if len(classes) < 2 or len(set(classes)) < len(classes):
        raise DataError(f"{len(classes)} classes, {len(set(classes))} different ones", where,
                        "a classifier needs two or more, each with its own name")
    train = _check_images(raw.train_images, f"{where}, train images")
    test = _check_images(raw.test_images, f"{where}, test images")
    if train.shape[1:] != test.shape[1:]:
        raise DataError(f"train images are {train.shape[1:]}, test images {test.shape[1:]}", where,
                        "(C, H, W) must be the same")
    train_labels = _check_labels(raw.train_labels, len(train), classes, f"{where}, train labels")
    test_labels = _check_labels(raw.test_labels, len(test), classes, f"{where}, test labels")
    present = torch.bincount(train_labels, minlength=len(classes))
    empty = [classes[k] for k in (present == 0).nonzero().flatten().tolist()]
    if empty:
        raise DataError(f"{len(empty)} of {len(classes)} classes have no training image, the first is {empty[0]!r}",
                        where, "give each class an image, or number the classes without gaps")
    train, test, note = _same_type(train, test)
    return RawData(_tensor(train), train_labels, _tensor(test), test_labels, classes, (*raw.notes, *note),
                   raw.image_sha256, raw.mapped, raw.file)


def _tensor(images: np.ndarray) -> Tensor:
    """The images as a contiguous tensor, without a copy where that is possible (torch needs writable memory)."""
    images = np.ascontiguousarray(images)
    return torch.from_numpy(images if images.flags.writeable else images.copy())


def _same_type(train: np.ndarray, test: np.ndarray) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """Both as uint8 where no value is lost, else both as float32, with a note."""
    if train.dtype == test.dtype == np.uint8:
        return train, test, ()
    small = [images if images.dtype == np.uint8 else as_bytes(images) for images in (train, test)]
    if small[0] is not None and small[1] is not None:
        return small[0], small[1], ()
    train, test = (images if images.dtype == np.float32 else images.astype(np.float32) / 255
                   for images in (train, test))
    return train, test, ("images are kept as float32: their values are no multiples of 1/255",)


def check_batch(train: int, batch_size: int, real: int, name: str) -> None:
    """Raises DataError where the training images do not fill the `real` places of a batch, or a batch is one image."""
    if batch_size < 2:
        raise DataError(f"a batch of {batch_size} image", "train.batch_size",
                        "take 2 or more, batch norm has no statistics of one image")
    if train < real:
        raise DataError(f"{train} training images do not fill one batch of {real}", f"data.name={name}",
                        "lower train.batch_size or data.val_size, or raise data.train_size")
