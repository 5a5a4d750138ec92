"""From settings to checked images, to the three splits, and from there to the device."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mat_dist import rng
from mat_dist.config.fields import real_images
from mat_dist.config.plugins import raised
from mat_dist.config.schema import DataConfig
from mat_dist.data.arrays import check_labels, generated_images
from mat_dist.data.images import DataSets, ImageSet, RawData, find_dataset, sampled_rows
from mat_dist.distributed.stopping import StopFlag
from mat_dist.errors import ConfigError, DataError, MatError, printable

DEVICE_SHARE = 0.25  # of the free device memory may be filled with images by residency auto
RANGE_TOLERANCE = 1e-4  # rounding of resizing libraries; 0 - 3e-8 was refused by others and annoyed users
LEVEL_TOLERANCE = 1e-6  # how near to a multiple of 1/255 a number must be to be stored as a byte
VAL_SHARE = 0.02  # of the training images are held out,
VAL_LEAST = 500  # but this many (RobustBench-size sets keep 49 000 or 59 000 of their training images),
VAL_MOST = 0.2  # and never more than this share
_CHUNK = 1024  # images looked at in one go, so that temporary copies stay small
_BUILT_IN = ("digits", "fashion_mnist", "cifar10", "cifar100", "svhn", "npz")


def load_data(config: DataConfig, *, seed: int, batch_size: int, build_cache: bool = True,
              stop: StopFlag | None = None) -> DataSets:
    """Read a data set, check it, and split it; a function of (config, seed) and of the files.

    The images stay in host memory or in a mapped file: `place` moves them to a device.

    Args:
        seed: it draws the validation images and the training subset, but not the test subset.
        batch_size: images of a whole training batch.
        build_cache: this process may write files that ranks share (a cache, a download); others wait for them. True
            for the first rank of a node.
        stop: looked at between images while a folder is listed or decoded, while a download runs, and while waiting
            for another process that does these.

    Raises:
        ConfigError: settings that do not go together.
        DataError: the data cannot be used; the message says which file or array.
        OutputError: the cache cannot be written.
        StopRequested: this process was asked to stop.
    """
    raw = check_raw(_read(find_dataset(config.name), config, build_cache, stop), _where(config))
    train_rows, val_rows, test_rows = _rows(raw, config, seed, batch_size)
    whole = ImageSet(raw.train_images, raw.train_labels, mapped=raw.mapped, file=raw.file)
    test = ImageSet(raw.test_images, raw.test_labels, mapped=raw.mapped, file=raw.file)
    digest, notes, generated = data_digest(config.name, raw), list(raw.notes), None
    if config.generated is not None:
        generated, more = generated_images(config.generated, whole.shape, len(raw.classes))
        digest = hashlib.sha256(f"{digest} generated {more}".encode()).hexdigest()
        notes.append(f"{config.generated_share:.0%} of each batch are drawn from the {len(generated)} generated images "
                     f"of {config.generated}")
    train = whole.select(train_rows)
    if sampled_rows(train) < len(train):
        notes.append(f"channel means and deviations are those of {sampled_rows(train)} of {len(train)} training images")
    return DataSets(train, whole.select(val_rows), test if test_rows is None else test.select(test_rows), raw.classes,
                    digest, tuple(map(printable, notes)), generated)


@dataclasses.dataclass(frozen=True)
class Preview:
    """What is known of a data set before its pixels are read: (C, H, W), classes, training images (None where only
    reading tells), lines to tell."""

    shape: tuple[int, int, int]
    classes: int
    train: int | None
    notes: tuple[str, ...] = ()


def preview_data(config: DataConfig, look: Callable[[DataConfig], RawData], *, seed: int, batch_size: int) -> Preview:
    """What `load_data` would give. `look` returns what it can of a data set at little cost; its pixels do not count.
    Raises ConfigError and DataError as `load_data` does."""
    raw = check_layout(_read(look, config), _where(config))
    train_rows, *_ = _rows(raw, config, seed, batch_size)
    shape, classes = raw.train_images.shape[1:], len(raw.classes)
    if config.generated is not None:
        generated_images(config.generated, shape, classes)
    return Preview(shape, classes, len(train_rows), tuple(map(printable, raw.notes)))


def _where(config: DataConfig) -> str:
    return f"data.name={config.name}" + (f", data.root={config.root}" if config.root else "")


def _read(reader: Callable[..., RawData], config: DataConfig, *more: Any) -> RawData:
    """What the reader returns. Raises DataError for whatever has no message of its own."""
    _check_settings(config)
    try:
        return reader(config, *more)
    except OSError as problem:  # a folder on the way that may not be entered, a network disk that went away
        raise DataError(f"cannot read the data: {problem.strerror or problem}", problem.filename or _where(config),
                        "check that this path is there and readable on every node") from problem
    except MemoryError as problem:
        raise DataError(f"the images do not fit into memory ({problem})", _where(config),
                        "take fewer or smaller images, or raise the memory limit (ulimit -v)") from problem
    except (Exception, SystemExit) as problem:
        if isinstance(problem, MatError) or config.name in (*_BUILT_IN, "folder"):
            raise
        raise DataError(f"its reader {raised(problem)}", _where(config), "correct the file") from problem


def _rows(raw: RawData, config: DataConfig, seed: int, batch_size: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Training, validation and test rows (None: all of the test images). DataError where there are too few."""
    train, val = split_train(raw.train_labels, seed=seed, val_size=config.val_size, train_size=config.train_size)
    if len(train) < (real := real_images(batch_size, config.generated_share)):
        raise DataError(f"{len(train)} training images do not fill one batch of {real}", f"data.name={config.name}",
                        "lower train.batch_size or data.val_size, or raise data.train_size")
    return train, val, subset_test(raw.test_labels, config.test_size)


def _check_settings(config: DataConfig) -> None:
    """Settings that the data set would not read."""
    if config.name in _BUILT_IN and config.image_size is not None:
        raise ConfigError(f"data.image_size={config.image_size} has no meaning for {config.name}", "data.image_size",
                          "remove it; only data.name=folder resizes")
    if config.name == "digits" and config.root is not None:
        raise ConfigError(f"data.root={config.root} has no meaning for digits, a part of the package", "data.root",
                          "remove it; for images of your own: --config own_images, or data.name=folder (npz, ...)")
    if config.name in _BUILT_IN and config.residency == "mmap":
        raise ConfigError(f"data.residency=mmap has no meaning for {config.name}", "data.residency",
                          "use host; only data.name=folder has a cache to map")


def data_digest(name: str, raw: RawData) -> str:
    """SHA-256 over name, classes, shapes, types, labels and image bytes; the same for mapped and loaded images."""
    digest = hashlib.sha256()
    for text in (name, *raw.classes):
        digest.update(f"{len(text)}:{text}".encode())
    known = raw.image_sha256 or (_sha256(raw.train_images), _sha256(raw.test_images))
    for images, labels, image_sha in ((raw.train_images, raw.train_labels, known[0]),
                                      (raw.test_images, raw.test_labels, known[1])):
        digest.update(f"{tuple(images.shape)} {images.dtype} {image_sha} {_sha256(labels)}".encode())
    return digest.hexdigest()


def _sha256(values: Tensor) -> str:
    return hashlib.sha256(values.numpy().reshape(-1).data).hexdigest()


def place(data: DataSets, residency: str, device: torch.device | str, *, sharing: int = 1) -> DataSets:
    """Move the images into device memory where `data.residency` says so; on the CPU nothing is to do.

    Args:
        residency: data.residency. auto moves where all three splits fill less than a quarter of the free memory.
        device: where the models are.
        sharing: processes on that device.

    Raises DataError where residency is device, and the images do not fit.
    """
    device = torch.device(device)
    if device.type != "cuda" or residency in ("host", "mmap"):
        return data
    nbytes = sum(split.nbytes for split in (data.train, data.val, data.test))
    free = torch.cuda.mem_get_info(device)[0] / sharing
    if residency == "auto" and nbytes >= free * DEVICE_SHARE:
        return data
    if nbytes >= free:
        raise DataError(f"the images need {nbytes / 2**30:.1f} GiB of device memory, {free / 2**30:.1f} GiB are free",
                        "data.residency=device", "set data.residency=host")
    moved = {name: getattr(data, name).to(device) for name in ("train", "val", "test")}
    return dataclasses.replace(data, **moved)


# ---------------------------------------------------------------- what every data set must satisfy


def check_raw(raw: RawData, where: str) -> RawData:
    """The same data as uint8 or float32 tensors (N, C, H, W) and int64 labels, checked; `where` names it in messages.

    Floats that are all multiples of 1/255 become uint8, in both splits or in none. Reads no pixel of uint8 images.
    """
    raw = check_layout(raw, where)
    train, test, notes = _same_type(_pixels(raw.train_images, f"{where}, train images"),
                                    _pixels(raw.test_images, f"{where}, test images"))
    return dataclasses.replace(raw, train_images=_tensor(train), test_images=_tensor(test), notes=(*raw.notes, *notes))


def check_layout(raw: RawData, where: str) -> RawData:
    """As `check_raw`, but for the pixels, which are not looked at: the images are arrays of any kind."""
    classes = tuple(str(name) for name in raw.classes)
    if len(classes) < 2 or len(set(classes)) < len(classes):
        raise DataError(f"{len(classes)} classes, {len(set(classes))} different ones", where,
                        "a classifier needs two or more, each with its own name")
    train = _check_shape(raw.train_images, f"{where}, train images")
    test = _check_shape(raw.test_images, f"{where}, test images")
    if train.shape[1:] != test.shape[1:]:
        raise DataError(f"train images are {train.shape[1:]}, test images {test.shape[1:]}", where,
                        "(C, H, W) must be the same")
    train_labels, done = check_labels(raw.train_labels, len(train), len(classes), f"{where}, train labels")
    test_labels, too = check_labels(raw.test_labels, len(test), len(classes), f"{where}, test labels")
    empty = [classes[k] for k in (torch.bincount(train_labels, minlength=len(classes)) == 0).nonzero().flatten()]
    if empty:
        raise DataError(f"{len(empty)} of {len(classes)} classes have no training image, the first is {empty[0]!r}",
                        where, "give each class an image, or number the classes without gaps")
    notes = [f"{name}: {text}" for name, text in (("train", done), ("test", too)) if text]
    return dataclasses.replace(raw, train_images=train, train_labels=train_labels, test_images=test,
                               test_labels=test_labels, classes=classes, notes=(*raw.notes, *notes))


def _check_shape(images: Tensor | np.ndarray, where: str) -> np.ndarray:
    array = np.asarray(images)
    if array.ndim != 4:
        raise DataError(f"images have shape {array.shape}", where, "give (N, C, H, W)")
    if 0 in array.shape:
        raise DataError("there are no images", where, "at least one is needed")
    if array.dtype != np.uint8 and array.dtype.kind != "f":
        raise DataError(f"images are {array.dtype}", where, "store uint8 (0 to 255), or float in [0, 1]")
    return array


def _pixels(array: np.ndarray, where: str) -> np.ndarray:
    """uint8 as it is; float as float32 clamped to [0, 1]."""
    if array.dtype == np.uint8:
        return array
    clamped = np.empty(array.shape, np.float32)
    for first in range(0, len(array), _CHUNK):
        chunk = array[first : first + _CHUNK].astype(np.float32)
        check_range(chunk, where, "normalisation is a layer of the model, give images in [0, 1] (or uint8 in 0 to 255)",
                    first)
        np.clip(chunk, 0, 1, out=clamped[first : first + _CHUNK])
    return clamped


def check_range(images: Any, where: str, how: str, first: int = 0) -> None:
    """Raises DataError for pixels outside [0, 1], of an array or a tensor; `first`: number of its first image."""
    inside = (images >= -RANGE_TOLERANCE) & (images <= 1 + RANGE_TOLERANCE)  # NaN is outside, too
    if inside.all():
        return
    row = inside.reshape(len(images), -1).all(1).tolist().index(False)
    bad = np.asarray(images[row].tolist())
    if not np.isfinite(bad).all():
        raise DataError(f"image {first + row} has NaN or infinite pixels", where, "repair or remove it")
    raise DataError(f"images outside [0, 1]: found {bad.min():.4g} to {bad.max():.4g}, first in image {first + row}",
                    where, how)


def _same_type(train: np.ndarray, test: np.ndarray) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """Both as uint8 where no value is lost, else both as float32, with a note."""
    if (small := _as_bytes(train)) is not None and (small_test := _as_bytes(test)) is not None:
        return small, small_test, ()
    train, test = (images if images.dtype == np.float32 else images.astype(np.float32) / 255
                   for images in (train, test))
    return train, test, ("images are kept as float32: their values are no multiples of 1/255",)


def _as_bytes(images: np.ndarray) -> np.ndarray | None:
    """Images as uint8, or None unless every value is a byte or a multiple of 1/255 within 1e-6."""
    if images.dtype == np.uint8:
        return images
    rounded = np.empty(images.shape, np.uint8)
    for first in range(0, len(images), _CHUNK):
        chunk = images[first : first + _CHUNK].astype(np.float64) * 255
        rounded[first : first + _CHUNK] = nearest = np.rint(chunk)
        if np.abs(chunk - nearest).max(initial=0) > 255 * LEVEL_TOLERANCE:
            return None
    return rounded


def _tensor(images: np.ndarray) -> Tensor:
    """The images as a contiguous tensor, without a copy where that is possible (torch needs writable memory)."""
    images = np.ascontiguousarray(images)
    return torch.from_numpy(images if images.flags.writeable else images.copy())


# ---------------------------------------------------------------- splits, as functions of (labels, key)


def allot(sizes: list[int], caps: list[int], count: int) -> list[int]:
    """Split `count` over classes of the given sizes by largest remainder, at most `caps` each; ties to the first class.

    The parts differ from count * size / sum(sizes) by less than one where no cap binds.
    """
    total = sum(sizes)
    parts = [min(count * size // total, cap) for size, cap in zip(sizes, caps, strict=True)]
    by_remainder = sorted(range(len(sizes)), key=lambda k: (-(count * sizes[k] % total), k))
    while (missing := count - sum(parts)) > 0:
        for k in [k for k in by_remainder if parts[k] < caps[k]][:missing]:
            parts[k] += 1
    return parts


def stratified(labels: Tensor, count: int, stream: int, *, leave_one: bool = False, one_each: bool = False) -> Tensor:
    """Indices (sorted, int64) of `count` images with the class shares of `labels`.

    Args:
        count: size of the subset, at most N (N minus the number of classes with `leave_one`).
        stream: key of the draw.
        leave_one: take all but one image of a class at most.
        one_each: take at least one image of each class; `count` is at least the number of classes.
    """
    labels = labels.cpu()
    classes, sizes = labels.unique(return_counts=True)
    caps = [size - int(leave_one) for size in sizes.tolist()]
    if count > sum(caps):
        raise ValueError(f"cannot take {count} of {len(labels)} images")
    order = rng.permutation(stream, len(labels))
    shuffled = labels[order]
    parts = allot(sizes.tolist(), caps, count)
    while one_each and 0 in parts:
        parts[parts.index(max(parts))] -= 1
        parts[parts.index(0)] = 1
    chosen = [order[shuffled == label][:part] for label, part in zip(classes.tolist(), parts, strict=True)]
    return torch.cat(chosen).sort().values


def complement(chosen: Tensor, count: int) -> Tensor:
    """The indices 0..count-1 that are not in `chosen`, sorted."""
    keep = torch.ones(count, dtype=torch.bool)
    keep[chosen] = False
    return keep.nonzero().flatten()


def default_val_size(train: int) -> int:
    """max(2 % of train, 500 images), at most 20 % of train."""
    return min(max(int(train * VAL_SHARE), VAL_LEAST), int(train * VAL_MOST))


def split_train(labels: Tensor, *, seed: int, val_size: int | None, train_size: int | None) -> tuple[Tensor, Tensor]:
    """Indices (train, val) of the training images with these labels; the validation images are taken first, so they do
    not depend on `train_size`. Raises DataError where val_size or train_size does not fit."""
    total, classes = len(labels), len(labels.unique())
    size = default_val_size(total) if val_size is None else val_size
    if not 1 <= size <= total - classes:
        raise DataError(f"cannot hold {size} validation images out of {total} training images of {classes} classes",
                        "data.val_size", f"choose 1 to {total - classes}, each class keeps a training image")
    val = stratified(labels, size, rng.key(seed, "val-split"), leave_one=True)
    train = complement(val, total)
    if train_size is None:
        return train, val
    if not classes <= train_size <= len(train):
        raise DataError(f"{train_size} training images asked for, {len(train)} of {classes} classes are there "
                        f"({size} more are held out for validation)", "data.train_size",
                        f"choose {classes} to {len(train)}")
    subset = stratified(labels[train], train_size, rng.key(seed, "train-subset"), one_each=True)
    return train[subset], val


def subset_test(labels: Tensor, test_size: int | None) -> Tensor | None:
    """Indices of the test subset, the same for every seed so that results of several seeds compare; None: all."""
    if test_size is None:
        return None
    if test_size > len(labels):
        raise DataError(f"{test_size} test images asked for, {len(labels)} are there", "data.test_size",
                        f"choose 1 to {len(labels)}")
    return stratified(labels, test_size, rng.key(0, "test-subset"))
