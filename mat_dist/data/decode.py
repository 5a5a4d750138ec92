"""Image files to uint8 arrays, in threads, a chunk at a time."""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from mat_dist.data.chunks import Chunk
from mat_dist.distributed.stopping import StopFlag, leave_if
from mat_dist.errors import DataError

FORMATS = ("JPEG", "PNG", "BMP", "WEBP")
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")
MOST_PIXELS = 89_478_485  # Pillow warns above this and goes on; we refuse, before any pixel is allocated
_CHUNK_BYTES, _CHUNK_FILES = 64 << 20, 1024  # decoded at a time: bounds memory, and the time between signs of life
_BLOCK = 16  # files that a thread takes at once
# What Pillow's decoders raise on damaged files.
_DAMAGE = (OSError, SyntaxError, ValueError, TypeError, ArithmeticError, LookupError, EOFError, struct.error,
           zlib.error, Image.DecompressionBombError)


def read_image(path: Path, side: int | None) -> np.ndarray:
    """One image as uint8 (H, W, 3); with `side`, its shorter side is resized to it and the centre square cut out.

    Bilinear with antialiasing, as torchvision's Resize and CenterCrop; an image of the right size is left untouched.
    Raises what Pillow raises, and ValueError for more than 89 million pixels.
    """
    with Image.open(path, formats=FORMATS) as image:
        width, height = image.size
        if width * height > MOST_PIXELS:
            raise ValueError(f"{width} x {height} pixels, at most {MOST_PIXELS} are decoded")
        if image.mode not in MODES:  # Pillow would cut 16-bit values off at 255 and say nothing
            raise ValueError(f"pixels of type {image.mode}, 8 bits per channel are needed")
        rgb = image.convert("RGB")
    if side is not None and rgb.size != (side, side):
        short = min(width, height)
        wide, tall = max(side, width * side // short), max(side, height * side // short)
        rgb = rgb.resize((wide, tall), Image.Resampling.BILINEAR)
        left, top = round((wide - side) / 2), round((tall - side) / 2)
        rgb = rgb.crop((left, top, left + side, top + side))
    return np.asarray(rgb)


def image_shape(root: Path, files: Sequence[str], side: int | None, *, skip_bad: bool) -> tuple[int, int, int]:
    """(3, H, W) of all decoded images: `side`, or the size of the first image that can be read.

    Raises:
        DataError: it cannot be read (with `skip_bad`: none of the first 100).
    """
    if side is not None:
        return 3, side, side
    for name in files[: 100 if skip_bad else 1]:
        try:
            height, width, channels = read_image(root / name, None).shape
        except _DAMAGE as problem:
            reason = f"{type(problem).__name__}: {problem}"
        else:
            return channels, height, width
    raise DataError(f"cannot read the image ({reason})", str(root / name), "repair or remove it")


def decode_all(root: Path, files: Sequence[str], shape: tuple[int, int, int], *, resize: bool,
               on_bad: Literal["stop", "skip"], allowed: int, begin: int = 0, bad: int = 0,
               stop: StopFlag | None = None) -> Iterator[Chunk]:
    """Decode `files` in order, at most 1024 images or 64 MiB (but 16 images) at a time.

    Args:
        root: folder that the names in `files` are below.
        files: the image files.
        shape: (3, H, W) of every decoded image.
        resize: make images that size; else another size is an error.
        on_bad: stop at a file that cannot be read, or leave it out.
        allowed: the most files that may be left out.
        begin: the first file to decode; those before it are done, and `bad` of them were left out.
        stop: looked at between two images.

    Raises:
        DataError: an unreadable file, too many of them, or images of several sizes.
        StopRequested: this process was asked to stop; the chunks so far are good.
    """
    side = shape[1] if resize else None
    length = min(_CHUNK_FILES, max(_BLOCK, _CHUNK_BYTES // int(np.prod(shape))))
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for first in range(begin, len(files), length):
            names = files[first : first + length]
            images = np.empty((len(names), *shape), np.uint8)

            def fill(start: int, names: Sequence[str] = names, images: np.ndarray = images) -> list[tuple[int, str]]:
                unread = []
                for place in range(start, min(start + _BLOCK, len(names))):
                    leave_if(stop, "decoding images", str(root))
                    if reason := _fill_one(images[place], root / names[place], side):
                        unread.append((place, reason))
                return unread

            failed = [item for block in pool.map(fill, range(0, len(names), _BLOCK)) for item in block]
            bad += len(failed)
            if bad > allowed:
                _refuse(root / names[failed[0][0]], failed[0][1], on_bad, bad, allowed, len(files))
            keep = np.ones(len(names), bool)
            keep[[place for place, _ in failed]] = False
            yield Chunk(images[keep] if failed else images, tuple(names[place] for place, _ in failed))


def _fill_one(target_CHW: np.ndarray, path: Path, side: int | None) -> str:
    """Decode one file into its place -> why that failed, or nothing. Another size than the target's is a DataError."""
    try:
        image = read_image(path, side)
    except _DAMAGE as problem:
        return f"{type(problem).__name__}: {problem}"
    if image.shape[:2] != target_CHW.shape[1:]:
        found, first = (f"{size[1]} x {size[0]}" for size in (image.shape, target_CHW.shape[1:]))
        raise DataError(f"images of several sizes: this one is {found}, the first {first}", str(path),
                        "set data.image_size to resize all images")
    target_CHW[:] = image.transpose(2, 0, 1)
    return ""


def _refuse(path: Path, reason: str, on_bad: str, bad: int, allowed: int, total: int) -> None:
    if on_bad == "stop":
        raise DataError(f"cannot read the image ({reason})", str(path),
                        "repair or remove it, or set data.on_bad=skip")
    raise DataError(f"{bad} or more of {total} images cannot be read, at most {allowed} (0.1 %) may be skipped; one "
                    f"reason: {reason}", str(path), "repair or remove them")
