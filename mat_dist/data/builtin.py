"""The data sets that have a name: `digits`, a part of the package, and those that torchvision reads and downloads.

What torchvision unpickles or unpacks is verified first: the archives of CIFAR are Python pickles, which can run code,
and a MATLAB file can unpack to a thousand times its size, whatever its header says.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import math
import os
import struct
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mat_dist import rng
from mat_dist.config.schema import DataConfig
from mat_dist.data.images import RawData, register_dataset, root_of
from mat_dist.data.load import complement, stratified
from mat_dist.data.shared import MOST_BYTES, Source, fetch_once
from mat_dist.distributed.stopping import StopFlag
from mat_dist.errors import DataError, OutputError

TEN_DIGITS = tuple(str(digit) for digit in range(10))
DIGITS_TEST = 360  # images, a fifth
# SHA-256 of the published archives, as in Keras and in torchvision's prototype data sets; torchvision has MD5 only.
CIFAR_SHA256 = {"cifar10": "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
                "cifar100": "85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7"}
SVHN_URL = "http://ufldl.stanford.edu/housenumbers/"
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")  # of the Debian package dataset-fashion-mnist
IDX_FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


def scale_levels(levels: np.ndarray) -> np.ndarray:
    """Counts 0..16 as bytes: round(255 v / 16)."""
    return ((levels.astype(np.int64) * 255 + 8) // 16).astype(np.uint8)


@register_dataset("digits")
def load_digits(config: DataConfig) -> RawData:
    """1437 training and 360 test images (N, 1, 8, 8), a stratified split that is the same for every seed.

    A toy: results say little about real images. Optical Recognition of Handwritten Digits, E. Alpaydin and C. Kaynak,
    UCI Machine Learning Repository, CC BY 4.0 (digits.LICENSE.txt).
    """
    with np.load(Path(__file__).with_name("digits.npz"), allow_pickle=False) as stored:
        images, labels = scale_levels(stored["images"])[:, None], stored["labels"].astype(np.int64)
    held_out = stratified(torch.from_numpy(labels), DIGITS_TEST, rng.key(0, "digits-test"))
    train, test = complement(held_out, len(labels)).numpy(), held_out.numpy()
    return RawData(images[train], labels[train], images[test], labels[test], TEN_DIGITS)


def _files(found: Callable[[], list[Path] | None], sources: Sequence[Source], folder: Path, config: DataConfig,
           build: bool, stop: StopFlag | None) -> list[Path] | None:
    """What `found` returns, after a download into `folder` where that is asked for; None where files are missing."""
    paths = found()
    if paths is None and config.download:
        return fetch_once(found, sources, folder, build=build, name=config.name, stop=stop)
    return paths


@register_dataset("cifar10", shared=True, stoppable=True)
@register_dataset("cifar100", shared=True, stoppable=True)
def load_cifar(config: DataConfig, build: bool, stop: StopFlag | None = None) -> RawData:
    """50 000 training and 10 000 test images (N, 3, 32, 32) in 10 or 100 classes (Krizhevsky, 2009), from the published
    archive in `data.root` (its folder, or the file itself). Raises DataError."""
    from torchvision import datasets

    published = getattr(datasets, config.name.upper())
    root = root_of(config, f"set it to the folder of {published.url}, or to where data.download=true may put it")

    def found() -> list[Path] | None:
        return [path for path in (root / published.filename, root) if path.is_file()][:1] or None

    paths = _files(found, [(published.url, published.filename, published.tgz_md5)], root, config, build, stop)
    if paths is None:
        unpacked = (root / published.base_folder).is_dir() or root.name == published.base_folder
        why = "only the unpacked folder, whose pickles cannot be verified" if unpacked else "the archive is not there"
        raise DataError(f"{published.filename} not found: {why}", f"data.root={root}",
                        f"put {published.url} into that folder, or add data.download=true")
    content = paths[0].read_bytes() if paths[0].stat().st_size <= MOST_BYTES else b""
    digest = hashlib.sha256(content).hexdigest()
    if digest != CIFAR_SHA256[config.name]:
        raise DataError(f"not the published {published.filename}: its SHA-256 is {digest} ({len(content)} bytes)",
                        str(paths[0]), "it may be incomplete or changed and is not opened; get it again from "
                                       f"{published.url}")
    return _unpacked(published, content)


def _unpacked(published: Any, archive: bytes) -> RawData:
    """What torchvision reads from a verified archive: out of memory, in a folder of this user alone, so that nobody
    can swap a pickle after the look at its digest."""
    try:
        with tempfile.TemporaryDirectory(prefix="mat_dist-") as folder:
            with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
                # Python 3.11.0 to 3.11.3 have no filters; what is unpacked was published, by its digest.
                tar.extraction_filter = getattr(tarfile, "data_filter", None)
                tar.extractall(folder)
            train, test = published(folder, train=True), published(folder, train=False)
    except OSError as problem:
        raise OutputError(f"cannot unpack {published.filename}: {problem.strerror or problem}", tempfile.gettempdir(),
                          "free 200 MB there, or set TMPDIR to another folder") from problem
    return RawData(train.data.transpose(0, 3, 1, 2), np.array(train.targets), test.data.transpose(0, 3, 1, 2),
                   np.array(test.targets), tuple(train.classes))


@register_dataset("svhn", shared=True, stoppable=True)
def load_svhn(config: DataConfig, build: bool, stop: StopFlag | None = None) -> RawData:
    """73 257 training and 26 032 test images (N, 3, 32, 32) of house numbers (Netzer et al., 2011). Raises DataError.

    Label 10 of the files is the digit 0. Only the published files are read: their MD5 is known, and for a given file
    nobody can make another one with the same MD5.
    """
    from torchvision.datasets import SVHN
    from torchvision.datasets.utils import calculate_md5

    sources = [tuple(SVHN.split_list[split]) for split in ("train", "test")]
    names = [name for _, name, _ in sources]
    root = root_of(config, f"set it to the folder of {' and '.join(names)}")

    def found() -> list[Path] | None:
        paths = [root / name for name in names]
        return paths if all(path.is_file() for path in paths) else None

    paths = _files(found, sources, root, config, build, stop)
    if paths is None:
        raise DataError(f"{' or '.join(names)} not found", f"data.root={root}",
                        f"put both from {SVHN_URL} there, or add data.download=true")
    for path, (_, name, md5) in zip(paths, sources, strict=True):
        if (digest := calculate_md5(path)) != md5:
            raise DataError(f"not the published {name}: its MD5 is {digest} instead of {md5}", str(path),
                            f"it may be incomplete or changed and is not opened; get it again from {SVHN_URL}")
    train, test = (SVHN(root, split=split) for split in ("train", "test"))
    return RawData(train.data, train.labels, test.data, test.labels, TEN_DIGITS)


@register_dataset("fashion_mnist", shared=True, stoppable=True)
def load_fashion_mnist(config: DataConfig, build: bool, stop: StopFlag | None = None) -> RawData:
    """60 000 training and 10 000 test images (N, 1, 28, 28) in 10 classes (Xiao et al., 2017) as idx files, plain or
    compressed: from `data.root`, torchvision's place below it, Debian's package, or a download. Raises DataError."""
    from torchvision.datasets import FashionMNIST

    root = DEBIAN_FOLDER if config.root is None else Path(os.path.expanduser(config.root))
    raw = root / "FashionMNIST" / "raw"  # torchvision's place

    def found() -> list[Path] | None:
        for folder in (root, raw):
            paths = [path for name in IDX_FILES
                     for path in [path for path in (folder / name, folder / f"{name}.gz") if path.is_file()][:1]]
            if len(paths) == len(IDX_FILES):
                return paths
        return None

    paths = _files(found, [(FashionMNIST.mirrors[0] + name, name, md5) for name, md5 in FashionMNIST.resources], raw,
                   config, build, stop)
    if paths is None:
        raise DataError(f"no idx files such as {IDX_FILES[0]}.gz", f"data.root={root}",
                        "set data.root to their folder, with data.download=true to fetch them, or leave it empty and "
                        "install Debian's dataset-fashion-mnist")
    train, train_labels, test, test_labels = (read_idx(path, axes) for path, axes in zip(paths, (3, 1, 3, 1),
                                                                                         strict=True))
    return RawData(train[:, None], train_labels, test[:, None], test_labels, tuple(FashionMNIST.classes))


def read_idx(path: Path, axes: int) -> np.ndarray:
    """An idx file of uint8 with `axes` axes (LeCun's format: 0, 0, 8, axes, then big-endian sizes), perhaps gzipped.

    torchvision's reader knows no compressed files and believes the header. Raises DataError: another header, more than
    1 GiB, or fewer or more bytes than the header says.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            head = file.read(4 + 4 * axes)
            if len(head) < 4 + 4 * axes or head[:4] != bytes((0, 0, 8, axes)):
                raise ValueError(f"not an idx file of bytes with {axes} axes: it starts with {head[:4].hex()}")
            sizes = struct.unpack(f">{axes}I", head[4:])
            count = math.prod(sizes)
            if not 0 < count <= MOST_BYTES:
                raise ValueError(f"the header says {' x '.join(map(str, sizes))} bytes, at most {MOST_BYTES} are read")
            content = file.read(count + 1)
        if len(content) != count:
            raise ValueError(f"{'more' if len(content) > count else 'fewer'} bytes than the {count} of the header")
    except (OSError, EOFError, zlib.error, ValueError) as problem:
        raise DataError(f"cannot read the file ({problem})", str(path), "copy the file again") from problem
    return np.frombuffer(content, np.uint8).reshape(sizes)
