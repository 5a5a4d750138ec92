"""`fashion_mnist`: 70 000 grey images of 28x28 pixels (Xiao, Rasul and Vollgraf, 2017), as idx files."""

from __future__ import annotations

import gzip
import os
import struct
import zlib
from pathlib import Path

import numpy as np

from mat_dist.config.schema import DataConfig
from mat_dist.data.download import fetch_once
from mat_dist.data.images import RawData
from mat_dist.data.registry import register_dataset
from mat_dist.distributed.stopping import StopFlag
from mat_dist.errors import DataError

DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")  # of the Debian package dataset-fashion-mnist
CLASSES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
MOST_BYTES = 1 << 30  # of one idx file; the largest real one has 47 MB


@register_dataset("fashion_mnist", shared=True, stoppable=True)
def load_fashion_mnist(config: DataConfig, build: bool, stop: StopFlag | None = None) -> RawData:
    """60 000 training and 10 000 test images (N, 1, 28, 28) from `data.root`, Debian's package, or a download.

    Raises:
        DataError: the files are missing or damaged.
    """
    if config.root is None:
        paths = _find(DEBIAN_FOLDER)
    else:
        root = Path(os.path.expanduser(config.root))
        raw = root / "FashionMNIST" / "raw"  # torchvision's place
        paths = _find(root) or _find(raw)
        if paths is None and config.download:
            paths = fetch_once(lambda: _find(raw), _sources(), raw, build=build, name="fashion_mnist", stop=stop)
    if paths is None:
        raise DataError(f"no idx files such as {FILES[0]}.gz", f"data.root={config.root or DEBIAN_FOLDER}",
                        "set data.root to their folder, with data.download=true to fetch them, or leave it empty and "
                        "install Debian's dataset-fashion-mnist")
    train_images, train_labels, test_images, test_labels = (read_idx(path, axes) for path, axes in
                                                            zip(paths, (3, 1, 3, 1), strict=True))
    return RawData(train_images[:, None], train_labels, test_images[:, None], test_labels, CLASSES)


def _find(folder: Path) -> tuple[Path, ...] | None:
    """The four files in `folder`, plain or compressed, or None where one is missing."""
    paths = [next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None) for name in FILES]
    return None if None in paths else tuple(path for path in paths if path is not None)


def _sources() -> list[tuple[str, str, str]]:
    """Where torchvision gets the files: url, name, MD5."""
    from torchvision.datasets import FashionMNIST

    return [(FashionMNIST.mirrors[0] + name, name, md5) for name, md5 in FashionMNIST.resources]


def read_idx(path: Path, axes: int) -> np.ndarray:
    """An idx file of uint8 with `axes` axes (LeCun's format: 0, 0, 8, axes, then big-endian sizes), perhaps gzipped.

    Raises:
        DataError: another header, more than 1 GiB, or fewer or more bytes than the header says.
    """
    how = "copy the file again"
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            head = file.read(4 + 4 * axes)
            if len(head) < 4 + 4 * axes or head[:4] != bytes((0, 0, 8, axes)):
                raise DataError(f"not an idx file of bytes with {axes} axes: it starts with {head[:4].hex()}",
                                str(path), how)
            sizes = struct.unpack(f">{axes}I", head[4:])
            count = int(np.prod(sizes, dtype=object))
            if not 0 < count <= MOST_BYTES:
                raise DataError(f"the header says {' x '.join(map(str, sizes))} bytes, at most {MOST_BYTES} are read",
                                str(path), how)
            content = file.read(count + 1)
    except (OSError, EOFError, zlib.error) as problem:
        raise DataError(f"cannot read the file ({problem})", str(path), how) from problem
    if len(content) != count:
        found = f"more than {count}" if len(content) > count else str(len(content))
        raise DataError(f"{found} bytes after the header, which says {count}", str(path), how)
    return np.frombuffer(content, np.uint8).reshape(sizes)
