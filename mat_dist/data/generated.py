"""Generated training images from an .npz file that stays on disk."""

from __future__ import annotations

import hashlib
import math
import zipfile
from pathlib import Path

import numpy as np
import torch

from mat_dist.data.arrays import DAMAGE, channels_first, existing_file, members_by_name, read_header
from mat_dist.data.images import ImageSet, MappedFile
from mat_dist.errors import DataError

_PROBED = 256  # images whose pixels enter the digest, evenly spread over the file
_LOCAL_HEADER = 30  # bytes of a zip member's local header before its name
_LAYOUT = "expected an uncompressed .npz (numpy.savez) with image, uint8 (N, H, W, C), and label"


def generated_images(name: str, shape: tuple[int, int, int], classes: int) -> tuple[ImageSet, str]:
    """Generated images with labels, as the public EDM files hold them (Wang et al., ICML 2023) -> set, digest.

    The images stay in the file, whose pages are read when they are used; labels are held in memory, a byte each (eight
    for more than 256 classes). The digest is the SHA-256 over shape, labels, the file's own checksum of the images, and
    the pixels of some of them.

    Args:
        name: the file.
        shape: (C, H, W) that they must have.
        classes: labels are 0..classes-1.

    Raises:
        DataError: no such file, another layout, shape or labels.
    """
    where = f"data.generated={name}"
    path = existing_file(name, where, _LAYOUT)
    try:
        file = MappedFile.of(path)
        with zipfile.ZipFile(path) as archive:
            members = members_by_name(archive, ("image", "label"), where, _LAYOUT)
            pixels, labels = (_mapped(archive, members[key], path, f"{where}, {key}") for key in ("image", "label"))
    except DAMAGE as problem:
        raise DataError(f"cannot read the file ({problem})", where, _LAYOUT) from problem
    if pixels.dtype != np.uint8:
        raise DataError(f"images are {pixels.dtype} of shape {pixels.shape}", where, "store one or more as uint8")
    images = torch.from_numpy(channels_first(pixels, where))
    if tuple(images.shape[1:]) != shape:
        raise DataError(f"generated images are (C, H, W) = {tuple(images.shape[1:])}, the training images {shape}",
                        where, "give images of the same data set")
    if labels.dtype.kind not in "iu" or labels.size != len(images) or labels.ndim > 2:
        raise DataError(f"labels are {labels.dtype} of shape {labels.shape} for {len(images)} images", where,
                        "give one whole number per image")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise DataError(f"labels from {low} to {high}, the data set has {classes} classes", where,
                        f"labels count from 0 to {classes - 1}, in the order of the data set's classes")
    digest = hashlib.sha256(f"{tuple(images.shape)} {members['image'].CRC}".encode())
    for index in np.linspace(0, len(pixels) - 1, min(_PROBED, len(pixels))).astype(int):
        digest.update(np.ascontiguousarray(pixels[index]).data)
    digest.update(np.ascontiguousarray(labels).data)
    kept = torch.from_numpy(labels.reshape(-1).astype(np.uint8 if classes <= 256 else np.int64))
    return ImageSet(images, kept, mapped=True, file=file), digest.hexdigest()


def _mapped(archive: zipfile.ZipFile, info: zipfile.ZipInfo, path: Path, where: str) -> np.ndarray:
    """One array of the file, mapped (numpy maps .npy files only)."""
    if info.compress_type != zipfile.ZIP_STORED:
        raise DataError("the array is compressed, which cannot be mapped into memory", where,
                        "unpack the file and pack it again with zip -0, or write it with numpy.savez")
    shape, fortran, dtype, start = read_header(archive, info, where)
    size = math.prod(shape) * dtype.itemsize
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
