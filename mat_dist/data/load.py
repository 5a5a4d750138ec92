"""From settings to the three splits, and from there to the device."""

from __future__ import annotations

import dataclasses
import hashlib

import torch
from torch import Tensor

from mat_dist.config.fields import real_images
from mat_dist.config.schema import DataConfig
from mat_dist.data.archive import generated_images, poisoned_images
from mat_dist.data.checks import check_batch, check_raw
from mat_dist.data.images import DataSets, ImageSet, RawData
from mat_dist.data.registry import find_dataset
from mat_dist.data.split import split_train, subset_test
from mat_dist.data.stats import sampled_rows
from mat_dist.distributed.stopping import StopFlag
from mat_dist.errors import ConfigError, DataError

DEVICE_SHARE = 0.25  # of the free device memory may be filled with images by residency auto
_BUILT_IN = ("digits", "fashion_mnist", "cifar10", "cifar100", "svhn", "npz")


def load_data(config: DataConfig, *, seed: int, batch_size: int, build_cache: bool = True,
              stop: StopFlag | None = None) -> DataSets:
    """Read a data set, check it, and split it; a function of (config, seed) and of the files.

    The images stay in host memory or in a mapped file: `place` moves them to a device.

    Args:
        config: the section `data`.
        seed: the run's seed; it draws the validation images and the training subset, but not the test subset.
        batch_size: images of a whole training batch.
        build_cache: this process may write files that ranks share (a cache, a download); others wait for them. True
            for the first rank of a node.
        stop: the stop request of this process; looked at between images while a folder is listed or decoded, while
            a download runs, and while waiting for another process that does these.

    Raises:
        ConfigError: settings that do not go together.
        DataError: the data cannot be used; the message says which file or array.
        EnvironmentFault: a library that this data set needs is missing.
        OutputError: the cache cannot be written.
        StopRequested: this process was asked to stop.
    """
    _check_settings(config)
    where = f"data.name={config.name}" + (f", data.root={config.root}" if config.root else "")
    try:
        raw = find_dataset(config.name)(config, build_cache, stop)
    except OSError as problem:  # a folder on the way that may not be entered, a network disk that went away
        raise DataError(f"cannot read the data: {problem.strerror}", problem.filename or where,
                        "check that this path is there and readable on every node") from problem
    raw = check_raw(raw, where)
    train_rows, val_rows = split_train(raw.train_labels, seed=seed, val_size=config.val_size,
                                       train_size=config.train_size)
    check_batch(len(train_rows), batch_size, real_images(batch_size, config.generated_share), config.name)
    whole = ImageSet(raw.train_images, raw.train_labels, mapped=raw.mapped, file=raw.file)
    learned, generated, digest, added = _more_images(config, raw, whole)
    test = ImageSet(raw.test_images, raw.test_labels, mapped=raw.mapped, file=raw.file)
    test_rows = subset_test(raw.test_labels, config.test_size)
    train, val = learned.select(train_rows), whole.select(val_rows)
    notes = [*raw.notes, *added]
    if sampled_rows(train) < len(train):
        notes.append(f"channel means and deviations are those of {sampled_rows(train)} of {len(train)} training images")
    return DataSets(train, val, test if test_rows is None else test.select(test_rows), raw.classes,
                    digest, tuple(notes), generated)


def _more_images(config: DataConfig, raw: RawData, whole: ImageSet) -> tuple[ImageSet, ImageSet | None, str, list[str]]:
    """The images in place of the training images, the generated ones, the digest of all, and notes."""
    digest, notes, learned, generated = data_digest(config.name, raw), [], whole, None
    if config.poison is not None:
        archive, more = poisoned_images(config.poison, raw)
        learned = ImageSet(archive.images, whole.labels, mapped=True, file=archive.file)
        digest = hashlib.sha256(f"{digest} poison {more}".encode()).hexdigest()
        notes.append(f"training on the poisoned images of {config.poison}; validation and test images are clean")
    if config.generated is not None:
        generated, more = generated_images(config.generated, whole.shape, len(raw.classes))
        digest = hashlib.sha256(f"{digest} generated {more}".encode()).hexdigest()
        notes.append(f"{config.generated_share:.0%} of each batch are drawn from the {len(generated)} generated images "
                     f"of {config.generated}")
    return learned, generated, digest, notes


def _check_settings(config: DataConfig) -> None:
    """Settings that the data set would not read."""
    if config.name in _BUILT_IN and config.image_size is not None:
        raise ConfigError(f"data.image_size={config.image_size} has no meaning for {config.name}", "data.image_size",
                          "remove it; only data.name=folder resizes")
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
        data: the splits.
        residency: data.residency. auto moves where all three splits fill less than a quarter of the free memory.
        device: where the models are.
        sharing: processes on that device.

    Raises:
        DataError: residency is device, and the images do not fit.
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
