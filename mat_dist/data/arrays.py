"""Images as numpy arrays in one .npz file, which is looked at before it is believed: `npz`, and generated images."""

from __future__ import annotations

import hashlib
import math
import os
import tokenize
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch

from mat_dist.config.schema import DataConfig
from mat_dist.data.images import ImageSet, MappedFile, RawData, check_memory, register_dataset, root_of
from mat_dist.errors import DataError

ARRAYS = ("x_train", "y_train", "x_test", "y_test")
MOST_RATIO = 1000  # deflate reaches 1032 on constant bytes; images reach 2 to 20
_RATIO_FROM = 1 << 20  # smaller arrays may be constant and cannot hurt
# What zipfile and numpy raise on damaged or encrypted files.
DAMAGE = (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error, RuntimeError, SyntaxError, TypeError,
          LookupError, OverflowError, tokenize.TokenError)
_LAYOUT = "expected an .npz with x_train, y_train, x_test, y_test and perhaps classes (names)"
_LABELS = "give whole numbers 0..K-1, one per image"
_PROBED = 256  # images whose pixels enter the digest, evenly spread over the file
_LOCAL_HEADER = 30  # bytes of a zip member's local header before its name
_GENERATED = "expected an uncompressed .npz (numpy.savez) with image, uint8 (N, H, W, C), and label"


@register_dataset("npz")
def load_npz(config: DataConfig, *, pixels: bool = True) -> RawData:
    """The arrays of the file `data.root`; without `pixels`, the images are 0 and fill no memory.

    Images are (N, H, W), (N, H, W, C) or (N, C, H, W) with 1 to 4 channels, uint8 or float in [0, 1]. Labels are whole
    numbers 0..K-1. `classes` (K strings) is optional, default "0".."K-1".

    Raises DataError: no such file or arrays, arrays that memory cannot hold, pickled objects.
    """
    path = existing_file(str(root_of(config, _LAYOUT)), f"data.root={config.root}", _LAYOUT)
    try:
        shapes = _check_sizes(path)
        with np.load(path, allow_pickle=False) as stored:
            x_train, x_test = (stored[name] if pixels else np.broadcast_to(np.zeros((), dtype), shape)
                               for name in ("x_train", "x_test") for shape, dtype in [shapes[name]])
            y_train, y_test = stored["y_train"], stored["y_test"]
            names = stored["classes"] if "classes" in stored.files else None
            unread = sorted(set(stored.files) - {*ARRAYS, "classes"})
    except DAMAGE as problem:
        raise DataError(f"cannot read the file ({problem})", f"data.root={path}", _LAYOUT) from problem
    classes = _numbers(y_train, f"{path}, y_train") if names is None else tuple(map(str, names.reshape(-1)))
    note = f"arrays that are not read: {', '.join(unread)}; validation images are taken from x_train"
    return RawData(channels_first(x_train, f"{path}, x_train"), y_train, channels_first(x_test, f"{path}, x_test"),
                   y_test, classes, (note,) if unread else ())


def existing_file(name: str, where: str, how: str) -> Path:
    """The path, `~` expanded. Raises DataError where there is no file."""
    path = Path(os.path.expanduser(name))
    if not path.is_file():
        raise DataError("the file does not exist" if not path.exists() else "not a file", where, how)
    return path


def class_numbers(labels: np.ndarray, where: str) -> tuple[np.ndarray, str]:
    """Labels as whole numbers in a row, and what was done for it, if anything. Raises DataError for other labels."""
    array, done = labels, ""
    if array.ndim == 2 and 1 in array.shape:
        array, done = array.reshape(-1), f"labels of shape {labels.shape} were taken as a row"
    if array.dtype.kind not in "iuf" or array.ndim != 1:
        more = " (y.argmax(1) of one-hot rows)" if labels.ndim == 2 else ""
        raise DataError(f"labels are {labels.dtype} of shape {labels.shape}", where, _LABELS + more)
    if array.dtype.kind == "f":
        broken = np.flatnonzero(~((array == np.rint(array)) & (np.abs(array.astype(float)) < 1 << 53)))
        if len(broken):
            raise DataError(f"label {array[broken[0]]} of image {broken[0]} is no whole number", where, _LABELS)
        done = "; ".join(filter(None, [done, f"labels are whole numbers in {array.dtype}"]))
        array = array.astype(np.int64)
    return array, done


def check_labels(labels: torch.Tensor | np.ndarray, count: int, classes: int, where: str) -> tuple[torch.Tensor, str]:
    """Labels as int64, and what was done for it. Raises DataError for labels that are no classes of `count` images."""
    array, done = class_numbers(np.asarray(labels), where)
    if len(array) != count:
        raise DataError(f"{count} images but {len(array)} labels", where, "give one label per image")
    outside = np.flatnonzero((array < 0) | (array >= classes))
    if len(outside):
        raise DataError(f"label {array[outside[0]]} of image {outside[0]} is out of range", where,
                        f"labels count from 0 to {classes - 1} for {classes} classes")
    return torch.from_numpy(array.astype(np.int64)), done


def _numbers(labels: np.ndarray, where: str) -> tuple[str, ...]:
    """Class names "0", "1", ... up to the highest training label."""
    numbers, _ = class_numbers(labels, where)
    highest = int(numbers.max(initial=0))
    if highest >= len(numbers):
        raise DataError(f"label {highest} among {len(numbers)} labels", where, "number the classes from 0 without gaps")
    return tuple(str(number) for number in range(highest + 1))


def _check_sizes(path: Path) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shapes and types, from the arrays' headers only, so that nothing large is allocated for a file that lies.
    DataError for arrays that are missing, hold objects, do not fit into memory, or are compressed beyond belief."""
    total, found = 0, {}
    with zipfile.ZipFile(path) as archive:
        members = members_by_name(archive, ARRAYS, str(path), _LAYOUT)
        for name in (*ARRAYS, *(name for name in members if name == "classes")):
            info, where = members[name], f"{path}, {name}"
            shape, _, dtype, start = read_header(archive, info, where)
            size = info.file_size - start
            ratio = size / max(info.compress_size, 1)
            if size >= _RATIO_FROM and name.startswith("x_") and ratio > MOST_RATIO:
                raise DataError(f"{size} bytes are compressed {ratio:.0f} to 1", where,
                                "real images are not; write the file again without compression if they are")
            total += size
            found[name] = shape, dtype
    check_memory(total, str(path), "take fewer or smaller images, or data.name=folder with data.residency=mmap")
    return found


def members_by_name(archive: zipfile.ZipFile, needed: tuple[str, ...], where: str, how: str
                    ) -> dict[str, zipfile.ZipInfo]:
    """The members of an .npz by array name. Raises DataError where one is missing or there twice."""
    members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
    if len(members) < len(archive.infolist()):  # numpy could read another one than we look at
        raise DataError("two members of one name", where, "write the file again with numpy.savez")
    missing = [name for name in needed if name not in members]
    if missing:
        raise DataError(f"no array {missing[0]}, found {', '.join(sorted(members)[:8]) or 'none'}", where, how)
    return members


def read_header(archive: zipfile.ZipFile, info: zipfile.ZipInfo, where: str
                ) -> tuple[tuple[int, ...], bool, np.dtype, int]:
    """Shape, whether it lies column by column, type and header length of an array; numpy bounds the header to 10 000
    characters."""
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    with archive.open(info) as file:
        version = np.lib.format.read_magic(file)
        if version not in readers:
            raise DataError(f"array format version {version}", where, "write the file with numpy.savez")
        shape, fortran, dtype = readers[version](file)
        if dtype.hasobject or dtype.kind not in "uifbU":
            raise DataError(f"an array of {dtype}", where, "store plain numbers (class names as strings)")
        size, there = math.prod(map(int, shape)) * dtype.itemsize, info.file_size - file.tell()
        if size != there:
            raise DataError(f"the header says {size} bytes, the archive {there}", where,
                            "write the file again with numpy.savez")
        return tuple(int(side) for side in shape), fortran, dtype, file.tell()


def channels_first(images: np.ndarray, where: str) -> np.ndarray:
    """(N, H, W), (N, H, W, C) or (N, C, H, W) as (N, C, H, W); the channel axis is the one with 1 to 4 entries."""
    if images.ndim == 3:
        return images[:, None]
    if images.ndim == 4:
        first, last = (1 <= images.shape[axis] <= 4 for axis in (1, 3))
        if first and not last:
            return images
        if last and not first:
            return images.transpose(0, 3, 1, 2)
    raise DataError(f"images have shape {images.shape}", where,
                    "give (N, H, W), (N, H, W, C) or (N, C, H, W) with 1 to 4 channels")


def generated_images(name: str, shape: tuple[int, int, int], classes: int) -> tuple[ImageSet, str]:
    """Generated images with labels, as the public EDM files hold them (Wang et al., ICML 2023) -> set, digest.

    The images stay in the file, whose pages are read when they are used; labels are held in memory, a byte each (eight
    for more than 256 classes). The digest is the SHA-256 over shape, labels, the file's own checksum of the images, and
    the pixels of some of them.

    Args:
        shape: (C, H, W) that they must have.

    Raises DataError: no such file, another layout, shape or labels.
    """
    where = f"data.generated={name}"
    path = existing_file(name, where, _GENERATED)
    try:
        file = MappedFile.of(path)
        with zipfile.ZipFile(path) as archive:
            members = members_by_name(archive, ("image", "label"), where, _GENERATED)
            pixels, labels = (_mapped(archive, members[key], path, f"{where}, {key}") for key in ("image", "label"))
    except DAMAGE as problem:
        raise DataError(f"cannot read the file ({problem})", where, _GENERATED) from problem
    if pixels.dtype != np.uint8:
        raise DataError(f"images are {pixels.dtype} of shape {pixels.shape}", where, "store one or more as uint8")
    images = torch.from_numpy(channels_first(pixels, where))
    if tuple(images.shape[1:]) != shape:
        raise DataError(f"generated images are (C, H, W) = {tuple(images.shape[1:])}, the training images {shape}",
                        where, "give images of the same data set")
    numbers, _ = check_labels(labels, len(images), classes, where)
    digest = hashlib.sha256(f"{tuple(images.shape)} {members['image'].CRC}".encode())
    for index in np.linspace(0, len(pixels) - 1, min(_PROBED, len(pixels))).astype(int):
        digest.update(np.ascontiguousarray(pixels[index]).data)
    digest.update(np.ascontiguousarray(labels).data)
    kept = numbers.to(torch.uint8 if classes <= 256 else torch.int64)
    return ImageSet(images, kept, mapped=True, file=file), digest.hexdigest()


def _mapped(archive: zipfile.ZipFile, info: zipfile.ZipInfo, path: Path, where: str) -> np.ndarray:
    """One array of the file, mapped (numpy maps .npy files only)."""
    if info.compress_type != zipfile.ZIP_STORED:
        raise DataError("the array is compressed, which cannot be mapped into memory", where,
                        "unpack the file and pack it again with zip -0, or write it with numpy.savez")
    shape, fortran, dtype, start = read_header(archive, info, where)
    if fortran or 0 in shape:
        raise DataError(f"an array of shape {shape}{', column by column' if fortran else ''}", where,
                        "write the file again with numpy.savez from contiguous arrays")
    with open(path, "rb") as file:
        file.seek(info.header_offset)
        local = file.read(_LOCAL_HEADER)
    # Lengths of name and extra field; the central directory may have others.
    skipped = _LOCAL_HEADER + int.from_bytes(local[26:28], "little") + int.from_bytes(local[28:30], "little")
    # Copy-on-write only because torch wants writable memory; nothing writes to it.
    return np.memmap(path, dtype, mode="c", offset=info.header_offset + skipped + start, shape=shape)
