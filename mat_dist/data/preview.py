"""A look at an image folder whose cache is not built yet: a few images, nothing is written."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mat_dist.config.schema import DataConfig
from mat_dist.data.cache import Cache, cache_folder
from mat_dist.data.decode import decode_all, image_shape
from mat_dist.data.folder import cache_key, list_images, maps
from mat_dist.errors import OutputError


@dataclass(frozen=True)
class Preview:
    """Some decoded training images, uint8 (n, C, H, W), with labels; the rest is about all of them.

    `nbytes` is the size of the cache that a run would build in `cache`; `count` is the number of image files.
    """

    images: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]
    count: int
    nbytes: int
    cache: Path

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width


def preview_folder(config: DataConfig, count: int) -> Preview | None:
    """About `count` training images, evenly spread; None where a run would read all images at once or open its cache.

    Raises:
        DataError: as loading does, for the images that are looked at.
        OutputError: the cache cannot be built in its folder.
    """
    if config.root is None or not os.path.isdir(os.path.expanduser(config.root)):
        return None  # loading says what is wrong
    listing = list_images(Path(os.path.expanduser(config.root)))
    shape = image_shape(listing.root, listing.train.files, config.image_size, skip_bad=config.on_bad == "skip")
    if not maps(config, listing, shape):
        return None
    folder = cache_folder(config.cache)
    if Cache(folder, cache_key(listing, config)).look()[0] is not None:
        return None
    nbytes, free = listing.count * int(np.prod(shape)), shutil.disk_usage(folder).free
    if free < nbytes:
        raise OutputError(f"the cache of decoded images needs {nbytes / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are "
                          "free", str(folder), "free space there, or set data.cache to a folder on another disk")
    rows = np.linspace(0, len(listing.train.files) - 1, min(count, len(listing.train.files))).astype(np.int64)
    names = [listing.train.files[row] for row in rows]
    chunks = list(decode_all(listing.root, names, shape, resize=config.image_size is not None, on_bad=config.on_bad,
                             allowed=len(names) - 1 if config.on_bad == "skip" else 0))
    skipped = {name for chunk in chunks for name in chunk.skipped}
    labels = listing.train.labels[[row for row, name in zip(rows, names, strict=True) if name not in skipped]]
    return Preview(np.concatenate([chunk.images for chunk in chunks]), labels, listing.classes, listing.count, nbytes,
                   folder)
