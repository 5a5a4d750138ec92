"""More training images from an .npz file that stays on disk: generated ones, and poisoned ones in place of the real."""

from __future__ import annotations

import hashlib
import os
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mat_dist.data.images import ImageSet, MappedFile, RawData
from mat_dist.data.npz import DAMAGE, channels_first, read_header
from mat_dist.errors import DataError

_PROBED = 256  # images whose pixels enter the digest, evenly spread over the file
_LOCAL_HEADER = 30  # bytes of a zip member's local header before its name
_LAYOUT = "expected an uncompressed .npz (numpy.savez) with image, uint8 (N, H, W, C), and for generated images label"


@dataclass(frozen=True)
class Archive:
    """Images mapped from a file.

    Attributes:
        images: uint8 (N, C, H, W), a view of the file.
        labels: whole numbers (N,) as they are stored, None where the file has none.
        file: looked at before each batch.
        digest: SHA-256 over shape, labels, the file's own checksum of the images, and the pixels of some of them.
    """

    images: Tensor
    labels: np.ndarray | None
    file: MappedFile
    digest: str


def generated_images(name: str, shape: tuple[int, int, int], classes: int) -> tuple[ImageSet, str]:
    """Generated images with labels, as the public EDM files hold them (Wang et al., ICML 2023) -> set, digest.

    The images stay in the file; labels are held in memory, a byte each (eight for more than 256 classes).

    Args:
        name: the file.
        shape: (C, H, W) that they must have.
        classes: labels are 0..classes-1.

    Raises:
        DataError: no such file, another layout, shape or labels.
    """
    where = f"data.generated={name}"
    archive = open_archive(name, where)
    found = tuple(archive.images.shape[1:])
    if found != shape:
        raise DataError(f"generated images are (C, H, W) = {found}, the training images {shape}", where,
                        "give images of the same data set")
    labels = archive.labels
    if labels is None:
        raise DataError("no array label", where, _LAYOUT)
    if labels.dtype.kind not in "iu" or labels.size != len(archive.images) or labels.ndim > 2:
        raise DataError(f"labels are {labels.dtype} of shape {labels.shape} for {len(archive.images)} images", where,
                        "give one whole number per image")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise DataError(f"labels from {low} to {high}, the data set has {classes} classes", where,
                        f"labels count from 0 to {classes - 1}, in the order of the data set's classes")
    kept = torch.from_numpy(labels.reshape(-1).astype(np.uint8 if classes <= 256 else np.int64))
    return ImageSet(archive.images, kept, mapped=True, file=archive.file), archive.digest


def poisoned_images(name: str, raw: RawData) -> tuple[Archive, str]:
    """Delusive images that take the places of the training images, one by one -> archive, digest.

    Raises:
        DataError: no such file, another layout, count or shape.
    """
    where = f"data.poison={name}"
    archive = open_archive(name, where)
    found, wanted = tuple(archive.images.shape), tuple(raw.train_images.shape)
    if found != wanted:
        raise DataError(f"poisoned images are (N, C, H, W) = {found}, the training images {wanted}", where,
                        "give one image for each training image (before the validation split), in their order")
    return archive, archive.digest


def open_archive(name: str, where: str) -> Archive:
    """Map the arrays `image` and, if it is there, `label` of an uncompressed .npz.

    Raises:
        DataError: the file cannot be read or mapped; `where` names the setting.
    """
    path = Path(os.path.expanduser(name))
    if not path.is_file():
        raise DataError("the file does not exist" if not path.exists() else "not a file", where, _LAYOUT)
    try:
        file = MappedFile.of(path)
        with zipfile.ZipFile(path) as archive:
            members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            if len(members) < len(archive.infolist()):
                raise DataError("two members of one name", where, "write the file again with numpy.savez")
            if "image" not in members:
                raise DataError(f"no array image, found {', '.join(sorted(members)[:8]) or 'none'}", where, _LAYOUT)
            stored = {key: _mapped(path, archive, members[key], f"{where}, {key}")
                      for key in ("image", "label") if key in members}
    except DAMAGE as problem:
        raise DataError(f"cannot read the file ({problem})", where, _LAYOUT) from problem
    pixels, labels = stored["image"], stored.get("label")
    if pixels.dtype != np.uint8 or 0 in pixels.shape:
        raise DataError(f"images are {pixels.dtype} of shape {pixels.shape}", where, "store one or more as uint8")
    images = torch.from_numpy(channels_first(pixels, where))
    digest = hashlib.sha256(f"{tuple(images.shape)} {members['image'].CRC}".encode())
    for index in np.linspace(0, len(pixels) - 1, min(_PROBED, len(pixels))).astype(int):
        digest.update(np.ascontiguousarray(pixels[index]).data)
    digest.update(b"" if labels is None else np.ascontiguousarray(labels).data)
    return Archive(images, labels, file, digest.hexdigest())


def _mapped(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo, where: str) -> np.ndarray:
    """One array of the file, mapped: its pages are read when they are used."""
    if info.compress_type != zipfile.ZIP_STORED:
        raise DataError("the array is compressed, which cannot be mapped into memory", where,
                        "unpack the file and pack it again with zip -0, or write it with numpy.savez")
    with archive.open(info) as member:
        shape, fortran, dtype, start = read_header(member, where)
    size = int(np.prod([int(side) for side in shape], dtype=object)) * dtype.itemsize
    if size + start != info.file_size or fortran or size == 0:
        raise DataError(f"{info.file_size - start} bytes for shape {shape}{', column by column' if fortran else ''}",
                        where, "write the file again with numpy.savez from contiguous arrays")
    with open(path, "rb") as file:
        file.seek(info.header_offset)
        local = file.read(_LOCAL_HEADER)
    # Lengths of name and extra field; the central directory may have others.
    skipped = _LOCAL_HEADER + int.from_bytes(local[26:28], "little") + int.from_bytes(local[28:30], "little")
    # Copy-on-write only because torch wants writable memory; nothing writes to it.
    return np.memmap(path, dtype, mode="c", offset=info.header_offset + skipped + start, shape=shape)
